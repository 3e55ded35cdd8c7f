"""Adapters of classifiers and reward models: how many labels, what they are called, and which token is padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayesian_lora_kernels.commands.adapter import AdapterFolder
from bayesian_lora_kernels.commands.errors import InputError

HEADS = ("score", "classifier", "classification_head")  # what transformers calls them
MODEL_CONFIG = "config.json"


def classifier_config(folder: AdapterFolder) -> Any:
    """Configuration of the base model with as many labels as the adapter has, and their names.

    How many: the rows of the classification head that the adapter holds, else what the base says. Names: of a
    config.json in the adapter's folder, else of the base, if there are as many; else `LABEL_0` and so on.

    Raises:
        InputError: if it cannot be loaded, or the labels do not exclude each other.
    """
    config = folder.base_config()
    found = [_rows(name, shape) for name, shape in folder.shapes().items()]
    count = next((rows for rows in found if rows is not None), config.num_labels)
    kind = getattr(config, "problem_type", None)
    if kind == "multi_label_classification" or (kind == "regression" and count > 1):
        raise InputError(
            f"{folder.base}: its problem_type is {kind}; expected a classifier of labels of which exactly one is right"
        )
    names = _own_names(folder.folder / MODEL_CONFIG) or _names(config.id2label)
    if len(names) != count or len(set(names)) != count:
        names = [f"LABEL_{i}" for i in range(count)]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    return config


def set_pad_token(model: Any, tokenizer: Any, examples: Sequence[Sequence[Sequence[int]]]) -> int:
    """What fills up a batch, told to the model, too: decoders read a text's logits before its first pad token.

    It is the tokenizer's pad token, which also filled up the batches in training, else that of the base model. If
    neither has one, batches cannot have been filled up, and a token that stands in no text changes nothing.

    Raises:
        InputError: if every token stands in some text.
    """
    base = model.get_base_model()
    size, configs = base.get_input_embeddings().weight.shape[0], [base.config, base.config.get_text_config()]
    known = [tokenizer.pad_token_id, *(getattr(config, "pad_token_id", None) for config in configs)]
    pad = next((token for token in known if isinstance(token, int) and 0 <= token < size), None)
    if pad is None:
        used = {token for inputs in examples for ids in inputs for token in ids}
        pad = next((token for token in range(size) if token not in used), None)
        if pad is None:
            raise InputError(
                "tokenizer: neither it nor the base model has a pad token, and every token stands in some text; "
                "expected the tokenizer that the adapter was trained with, in the adapter's folder"
            )
    for config in configs:
        config.pad_token_id = pad
    return pad


def _rows(name: str, shape: Sequence[int]) -> int | None:
    """How many labels a weight of the adapter is for, if it is the last of a classification head."""
    owner = name.removesuffix(".weight").removesuffix(".out_proj").rpartition(".")[2]
    return shape[0] if name.endswith(".weight") and owner in HEADS and len(shape) == 2 else None


def _own_names(path: Path) -> list[str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _names({int(i): name for i, name in content["id2label"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _names(id2label: Any) -> list[str]:
    return [str(id2label[i]) for i in sorted(id2label or {})]
