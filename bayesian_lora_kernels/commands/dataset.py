"""JSON lines of prompts and labels, and the padded batches made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.commands.errors import InputError


@dataclass(frozen=True)
class Example:
    """One line of the file.

    Attributes:
        line: its number in the file, from 1.
        prompt: what the model reads, as it is.
        label: index into the choices; None if the line has no label.
    """

    line: int
    prompt: str
    label: int | None


def read_examples(path: Path, choices: Sequence[str] | None, labelled: bool) -> list[Example]:
    """The examples of a JSON-lines file, `{"prompt": ..., "label": ...}` on each line; empty lines are skipped.

    Args:
        path: of the file, UTF-8.
        choices: what a label may be: one of them, or an index into them; None: labels are not read.
        labelled: whether every line must have a label.

    Raises:
        InputError: if the file cannot be read or holds no example; if a line is not such an object. It names the line.
    """
    if path.is_dir():
        raise InputError(f"{path}: expected a file of JSON lines, got a folder")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            examples.append(_example(line, number, f"{path}, line {number}: ", choices, labelled))
    if not examples:
        raise InputError(f"{path}: no examples; expected a JSON object on every line")
    return examples


def _example(line: str, number: int, where: str, choices: Sequence[str] | None, labelled: bool) -> Example:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(content, dict):
        raise InputError(f'{where}expected an object {{"prompt": ..., "label": ...}}, got {_json(content)}')
    if "prompt" not in content:
        raise InputError(f'{where}no "prompt"; its keys are {", ".join(map(_json, content)) or "none"}')
    if not isinstance(content["prompt"], str):
        raise InputError(f'{where}"prompt": expected text, got {_json(content["prompt"])}')
    label = None if choices is None else content.get("label")
    if label is None or choices is None:
        if labelled:
            raise InputError(f'{where}no "label"; its keys are {", ".join(map(_json, content))}')
        return Example(number, content["prompt"], None)
    return Example(number, content["prompt"], _label_index(label, choices, where))


def _label_index(label: Any, choices: Sequence[str], where: str) -> int:
    """Text is a choice, white space around it aside if need be; an integer is an index."""
    if isinstance(label, str):
        matches = [i for i, choice in enumerate(choices) if choice == label]
        matches = matches or [i for i, choice in enumerate(choices) if choice.strip() == label.strip()]
        if len(matches) == 1:
            return matches[0]
    elif isinstance(label, int) and not isinstance(label, bool):
        matches = [i for i, choice in enumerate(choices) if choice.strip() == str(label)]
        if matches and matches != [label]:
            raise InputError(
                f"{where}label {label} may be the choice {choices[matches[0]]!r} or an index into the choices, which "
                f'start at 0; write the choice as text, "{label}"'
            )
        if 0 <= label < len(choices):
            return label
    raise InputError(
        f"{where}label {_json(label)} is not among the choices {', '.join(map(repr, choices))}, nor an index from 0 to "
        f"{len(choices) - 1}"
    )


def _json(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def batches(
    sequences: Sequence[Sequence[int]], size: int, pad_id: int, labels: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """Token ids as padded batches: `input_ids` and `attention_mask` `[N, T]`, and `labels` `[N]` if there are any.

    Padding is on the right, whatever the tokenizer's own side: a causal model's tokens never see what follows them, so
    it cannot matter, and positions come out right without the model's help.
    """
    made = []
    for start in range(0, len(sequences), size):
        piece = sequences[start : start + size]
        width = max(len(ids) for ids in piece)
        input_ids = torch.full((len(piece), width), pad_id)
        mask = torch.zeros((len(piece), width), dtype=torch.long)
        for row, ids in enumerate(piece):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        batch = {"input_ids": input_ids, "attention_mask": mask}
        if labels is not None:
            batch["labels"] = torch.tensor(labels[start : start + size])
        made.append(batch)
    return made
