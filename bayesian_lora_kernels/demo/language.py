"""A language model that is there already, LoRA on top of it, and any question with answers of one token."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from bayesian_lora_kernels.demo.problem import Batch, Example, Splits, make_batch
from bayesian_lora_kernels.demo.settings import TuningSettings
from bayesian_lora_kernels.demo.training import add_lora, fine_tune
from bayesian_lora_kernels.model.fingerprint import take

# Until the training examples are known by heart.
TUNING = TuningSettings(rank=8, alpha=16, targets=None, epochs=4, batch_size=8, learning_rate=1e-3)
PROCESSOR = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        text: in words.
        classes: the answers.
        class_token_ids: `[C]`, their tokens.
        titles: of the measured sets.
    """

    text: str
    classes: Sequence[str]
    class_token_ids: Sequence[int]
    titles: Mapping[str, str]


class LanguageProblem:
    """One base model in memory, which every adapter is put on in turn.

    Args:
        name: of the model, for the cache.
        base: a causal language model of transformers, in eval mode.
        pad: a token that fills up.
        question: what is asked.
        draw: the sets of a seed.
        cache: folder for fine-tuned adapters, each in a folder that PEFT can read.
        batch_size: of fits and predictions.
        tuning: LoRA and its training.
        seconds: that loading took.
    """

    def __init__(
        self,
        name: str,
        base: nn.Module,
        pad: int,
        question: Question,
        draw: Callable[[int], Splits],
        cache: Path,
        batch_size: int = 8,
        tuning: TuningSettings = TUNING,
        seconds: Mapping[str, float] | None = None,
    ):
        self.name = name
        self.question, self.classes, self.titles = question.text, question.classes, question.titles
        self.class_token_ids = question.class_token_ids
        self.splits = draw
        self.predict_batch_size = batch_size
        self.seconds = seconds or {}
        self._base, self._pad, self._cache, self._tuning = base, pad, cache, tuning
        self._fingerprint = hashlib.sha256(take(base, ())[0].numpy().tobytes()).hexdigest()
        self._model: Any = None

    def fine_tune(self, examples: Sequence[Example], seed: int, progress: bool) -> nn.Module:
        """As `Problem` says. The model of the call before loses its adapter."""
        if self._model is not None:
            self._base = self._model.unload()
        self._model = model = add_lora(self._base, self._tuning, seed)
        folder = self._cache / self._digest(examples, seed)
        if folder.is_dir():
            _read_adapter(model, folder)
            return model.eval()
        steps = self._tuning.epochs * -(-len(examples) // self._tuning.batch_size)
        title = f"fine-tuning on {len(examples)} examples"
        device = next(model.parameters()).device
        with tqdm(total=steps, desc=title, unit="step", leave=False, disable=not progress) as bar:
            fine_tune(
                model,
                self.class_token_ids,
                examples,
                self._tuning,
                seed,
                tick=bar.update,
                batch=self.batch,
                forward=lambda: fastest_forward(device),
            )
        _write_adapter(model, folder)
        return model

    def batch(self, examples: Sequence[Example]) -> Batch:
        """As `Problem` says."""
        device = next(self._base.parameters()).device
        return {name: value.to(device) for name, value in make_batch(examples, self._pad, left=False).items()}

    def as_json(self) -> dict[str, Any]:
        """As `Problem` says."""
        return {"model": self.name, "tuning": asdict(self._tuning), "predict_batch_size": self.predict_batch_size}

    def _digest(self, examples: Sequence[Example], seed: int) -> str:
        """What an adapter depends on. Of the base a few values of every tensor stand for all."""
        content = {
            "model": self.name,
            "base": self._fingerprint,
            "tuning": asdict(self._tuning),
            "answers": list(self.class_token_ids),
            "seed": seed,
            "examples": [(one.tokens, one.answer) for one in examples],
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def fastest_forward(device: torch.device) -> AbstractContextManager[None]:
    """Autocast to bfloat16 where the device multiplies matrices faster in it, so that training takes half the time.

    Not for fits and predictions: the covariances of a deep model lose a tenth of their precision in it.
    """
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_bf16_supported())
    flags = PROCESSOR.read_text(encoding="utf-8") if PROCESSOR.is_file() else ""
    if device.type == "cpu" and ("avx512_bf16" in flags or "amx_bf16" in flags):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def _read_adapter(model: nn.Module, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    lacking = [key for key in found.missing_keys if "lora_" in key]
    if lacking or found.unexpected_keys:
        raise RuntimeError(f"{folder}: not an adapter of this model; remove it")


def _write_adapter(model: Any, folder: Path) -> None:
    """Whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".adapter-"))
    try:
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
