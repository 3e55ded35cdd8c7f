"""A base model from nothing, and LoRA on top of it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesian_lora_kernels.demo.problem import NO_ANSWER, Batch, Example, make_batch, shuffled
from bayesian_lora_kernels.demo.settings import BaseSettings, TuningSettings
from bayesian_lora_kernels.demo.task import MOST_TOKENS

Watch = Callable[[dict[str, float]], None]  # called after each step with the numbers to show


def make_base_model(settings: BaseSettings, vocabulary: int, pad: int, seed: int) -> nn.Module:
    """An untrained `transformers.LlamaForCausalLM`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.width,
            intermediate_size=settings.mlp,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=2 * MOST_TOKENS,
            initializer_range=settings.initial_std,
            tie_word_embeddings=False,
            pad_token_id=pad,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(settings.residual_scale)
    return model


def train_base_model(
    model: Any, examples: Sequence[Example], settings: BaseSettings, seed: int, watch: Watch = lambda numbers: None
) -> None:
    """Language modelling, and naming the module that a sentence comes from.

    Args:
        model: from `make_base_model`.
        examples: answers are tokens, or `NO_ANSWER`.
        settings: steps and rates.
        seed: of the order and of the positions that language modelling looks at.
        watch: sees `text` and `answer`, the two losses in nats.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )

    def rate(step: int) -> float:
        cosine = (1 + math.cos(math.pi * min(1.0, step / settings.steps))) / 2
        return min(1.0, (step + 1) / settings.warmup) * (0.05 + 0.95 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    epochs = (shuffled(examples, settings.batch_size, rng) for _ in itertools.count())
    model.train()
    for group in itertools.islice(itertools.chain.from_iterable(epochs), settings.steps):
        text, answer = _base_losses(model, make_batch(group), settings.position_share, generator)
        loss = text + settings.label_weight * answer
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        watch({"text": float(text.detach()), "answer": float(answer.detach())})
    model.eval()


def _base_losses(model: Any, batch: Batch, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the next token at a random share of the positions, and of the answer."""
    ids, mask, answers = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
    asked = mask[:, :-1] & (torch.rand(ids[:, 1:].shape, generator=generator) < share)
    text = F.cross_entropy(model.lm_head(hidden[:, :-1][asked]), ids[:, 1:][asked]) if asked.any() else hidden.sum() * 0
    known = answers != NO_ANSWER
    answer = F.cross_entropy(model.lm_head(hidden[:, -1][known]), answers[known]) if known.any() else hidden.sum() * 0
    return text, answer


def add_lora(base: nn.Module, settings: TuningSettings, seed: int) -> nn.Module:
    """A `peft.PeftModel` around the base model, which is then frozen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=None if settings.targets is None else list(settings.targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def fine_tune(
    model: nn.Module,
    class_token_ids: Sequence[int],
    examples: Sequence[Example],
    settings: TuningSettings,
    seed: int,
    watch: Watch = lambda numbers: None,
    tick: Callable[[], object] = lambda: None,
    batch: Callable[[Sequence[Example]], Batch] = make_batch,
    forward: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Cross-entropy between the classes, without weight decay, epoch after epoch: far into overconfidence.

    Args:
        model: from `add_lora`.
        class_token_ids: `[C]`, the tokens that the answers are chosen from.
        examples: answers are indices into them.
        settings: epochs and rates.
        seed: of the order.
        watch: called after each epoch with its mean `loss`.
        tick: called after each step.
        batch: makes one of examples.
        forward: each forward pass runs inside one of these. Autocast must not reach over several steps: it keeps what
            it has made of the weights.
    """
    rng = random.Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    model.train()
    for _ in range(settings.epochs):
        total = 0.0
        for group in shuffled(examples, settings.batch_size, rng):
            one = batch(group)
            with forward():
                logits = class_logits(model, one, class_token_ids)
            loss = F.cross_entropy(logits, one["labels"])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            tick()
            total += float(loss.detach()) * len(group)
        watch({"loss": total / len(examples)})
    model.eval()


def class_logits(model: nn.Module, batch: Batch, class_token_ids: Sequence[int]) -> Tensor:
    """`[N, C]`, the next token's logits, of the classes only; padding may be on either side."""
    mask = batch["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    positions, place = last.unique(return_inverse=True)
    options: dict[str, Any] = {"use_cache": False}
    whole: Any = model
    base = whole.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in signature(base.forward).parameters:
        options["logits_to_keep"] = positions
    else:
        place = last
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, **options).logits
    return logits[torch.arange(len(last), device=last.device), place][:, list(class_token_ids)].float()
