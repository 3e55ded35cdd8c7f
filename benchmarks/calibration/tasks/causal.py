"""Tiny Llamas that are made on the spot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .task import Example, Task

PAD = 0


@dataclass(frozen=True)
class Llama:
    """Sizes and pretraining."""

    vocabulary: int
    width: int = 96
    layers: int = 3
    heads: int = 4
    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3

    def make(self, seed: int = 0) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=128,
            initializer_range=0.06,
            tie_word_embeddings=False,
            pad_token_id=PAD,
        )
        return LlamaForCausalLM(config)

    def pretrained(self, texts: Iterator[Sequence[int]], answer_weight: float) -> dict[str, Tensor]:
        """Language modelling of the texts; the last token of each is an answer, and counts more than the others."""
        model = self.make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98))

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / self.steps)) / 2)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        model.train()
        for _ in range(self.steps):
            ids, mask = padded(list(itertools.islice(texts, self.batch_size)))
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            last = mask.sum(dim=-1) - 1
            is_answer = torch.arange(1, ids.shape[1])[None] == last[:, None]
            is_text = mask[:, 1:].bool() & ~is_answer
            loss = losses[is_text].mean() + answer_weight * losses[is_answer].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return dict(model.state_dict())

    def adapted(self, weights: dict[str, Tensor], seed: int, targets: list[str], rank: int) -> nn.Module:
        """The model with these weights and a new adapter."""
        import peft

        model = self.make()
        model.load_state_dict(weights)
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)


class NextToken(Task):
    """Choices by the next token, of texts that are padded on the left: only its logits are computed."""

    pad = PAD

    def tokens(self, examples: Sequence[Example]) -> list[Sequence[int]]:
        """Of each example."""
        return [example.content for example in examples]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids, mask = (side.flip(1) for side in padded([text[::-1] for text in self.tokens(examples)], self.pad))
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([one.label for one in examples])}

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        assert self.class_token_ids is not None
        output = model(batch["input_ids"], batch["attention_mask"], use_cache=False, logits_to_keep=1)
        return output.logits[:, -1, list(self.class_token_ids)]


def padded(texts: Sequence[Sequence[int]], pad: int = PAD) -> tuple[Tensor, Tensor]:
    """`[N, T]` twice: token ids padded on the right, and the mask."""
    width = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[pad] * (width - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return ids, mask


def collated(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch of examples whose contents are token ids."""
    ids, mask = padded([example.content for example in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([one.label for one in examples])}
