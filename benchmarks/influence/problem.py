"""A small causal LM with LoRA, made on the spot: which of four sources does a sequence of tokens come from?

Sources are distributions over 8 tokens. The answer is one of four more tokens, after the sequence, among all 12. The
base model learns this of four sources; the adapter learns it of others, half old and half new, from 240 examples, some
of them mislabelled. It is trained on the sum of the losses and `PRIOR / 2` times its squared weights, by full batches,
so that training depends on nothing but the examples and its start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

TOKENS, SOURCES, LENGTH = 8, 4, 10
VOCABULARY = TOKENS + SOURCES
TRAIN, QUERIES = 240, 100
NEW = 0.5  # the share of the adapter's sources that the base model has not seen
MISLABELLED = 0.15
PRIOR = 10.0
RANK = 2
STEPS, RATE = 60, 0.02
BASE_STEPS, BASE_BATCH = 300, 64

Data = tuple[Tensor, Tensor]  # input_ids [N, T], answers [N]


def sources(new: float) -> Tensor:
    """Probabilities of tokens `[SOURCES, TOKENS]`: the base model's, and a share of others."""
    old, other = (
        (1.3 * torch.randn(SOURCES, TOKENS, generator=torch.Generator().manual_seed(seed))).softmax(dim=-1)
        for seed in (1, 2)
    )
    return (1 - new) * old + new * other


def draw(of: Tensor, n: int, seed: int, mislabelled: float = 0.0) -> Data:
    """Sequences and answers."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(SOURCES, (n,), generator=generator)
    tokens = torch.multinomial(of[source], LENGTH, replacement=True, generator=generator)
    other = torch.randint(SOURCES, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < mislabelled
    return tokens, TOKENS + torch.where(wrong, other, source)


def train_data() -> Data:
    """What the adapter is trained on."""
    return draw(sources(NEW), TRAIN, 2, MISLABELLED)


def query_data() -> Data:
    """What influence is asked about."""
    return draw(sources(NEW), QUERIES, 3)


def answer_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """`[N, VOCABULARY]` after the last token."""
    logits: Tensor = model(input_ids=ids).logits[:, -1]
    return logits


def losses(model: nn.Module, data: Data) -> Tensor:
    """`[N]`."""
    return nn.functional.cross_entropy(answer_logits(model, data[0]), data[1], reduction="none")


def adapter(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def untrained() -> nn.Module:
    """The base model, trained here on other sources, and an adapter at its start."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=0,
    )
    base = transformers.LlamaForCausalLM(config)
    optimiser = torch.optim.Adam(base.parameters(), lr=3e-3)
    for step in range(BASE_STEPS):
        loss = losses(base, draw(sources(0.0), BASE_BATCH, 1000 + step)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(1)
    return peft.get_peft_model(base, settings).eval()


def train(model: nn.Module, start: Sequence[Tensor], data: Data) -> None:
    """Train the adapter from `start`."""
    parameters = adapter(model)
    with torch.no_grad():
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: (1 + math.cos(math.pi * i / STEPS)) / 2)
    for _ in range(STEPS):
        optimiser.zero_grad()
        objective(model, data).backward()
        optimiser.step()
        schedule.step()


def objective(model: nn.Module, data: Data) -> Tensor:
    """Minus the logarithm of the posterior, but for a constant."""
    return losses(model, data).sum() + 0.5 * PRIOR * sum(p.square().sum() for p in adapter(model))


def load(folder: Path) -> nn.Module:
    """The model that was trained on all of the data."""
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter", is_trainable=True
    )
    return model.eval()
