"""What pages of the documentation speak of as the reader's own: a small model, its data, its training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

answers = [4, 5]


def new_base() -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, initializer_range=0.1, **sizes))


def new_model(base: Any = None) -> Any:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base or new_base(), lora)


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    labels = torch.stack([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def examples(count: int) -> list[dict[str, Tensor]]:
    """Which word occurs more often, 2 or 3? One label in ten is wrong."""
    ids = torch.randint(2, 4, (count, 9), generator=torch.Generator().manual_seed(count))
    labels = ((ids == 3).sum(1) > 4).long()
    labels[::10] = 1 - labels[::10]
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def loader(rows: Sequence[Any]) -> list[dict[str, Tensor]]:
    return [collate(rows[i : i + 32]) for i in range(0, len(rows), 32)]


def train(model: Any, batches: Iterable[Mapping[str, Tensor]], epochs: int = 6) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(epochs):
        for batch in batches:
            logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, -1, answers]
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model
