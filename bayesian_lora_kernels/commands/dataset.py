"""JSON lines of prompts and labels, of texts or of pairs, and the padded batches made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.commands.errors import InputError, reading, undecodable

SIDES = ("chosen", "rejected")  # of a pair
_KEYS = {
    "text": '"text": ...',
    "pair": '"chosen": ..., "rejected": ...',
    "prompt": '"prompt": ..., "label": ...',
}

Content = str | list[dict[str, Any]]  # a text as it is, or the messages of a chat


@dataclass(frozen=True)
class Example:
    """One line of the file.

    Attributes:
        line: its number in the file, from 1.
        inputs: what the model reads: one, or the two of a pair.
        label: index into the choices; None if the line has no label. Of a pair 0, the one that was chosen.
        path: of the file, if it is one of JSON lines.
    """

    line: int
    inputs: tuple[Content, ...]
    label: int | None
    path: Path | None = None

    @property
    def where(self) -> str:
        """The line, as an error names it."""
        return f"line {self.line}" if self.path is None else f"{self.path}:{self.line}"


def read_examples(
    path: Path, choices: Sequence[str] | None, labelled: bool, pairs: bool = False, texts: bool = False
) -> list[Example]:
    """All of `stream_examples`.

    Raises:
        InputError: as that does, and if the file holds no example.
    """
    examples = list(stream_examples(path, choices, labelled, pairs, texts))
    if not examples:
        raise InputError(f"{path}: no examples; expected a JSON object on every line")
    return examples


def stream_examples(
    path: Path, choices: Sequence[str] | None, labelled: bool, pairs: bool = False, texts: bool = False
) -> Iterator[Example]:
    """The examples of a JSON-lines file, `{"prompt": ..., "label": ...}` on each line; empty lines are skipped.

    A chat stands under `messages`, in place of `prompt`. A pair is `{"prompt": ..., "chosen": ..., "rejected": ...}`,
    texts or lists of messages, to either of which the prompt is put in front, if there is one. A whole text stands
    under `text`. One line is in memory at a time.

    Args:
        path: of the file, UTF-8.
        choices: what a label may be: one of them, or an index into them; None: labels are not read.
        labelled: whether every line must have a label.
        pairs: whether the lines are pairs.
        texts: whether they are whole texts, which have no labels.

    Raises:
        InputError: if the file cannot be read; if a line is not such an object. It names the line.
    """
    with reading(path, "a file of JSON lines"), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}: "
            content = _object(line, where, "text" if texts else "pair" if pairs else "prompt")
            if pairs:
                yield Example(number, _pair(content, where), 0, path)
            elif texts:
                if "prompt" in content or "label" in content:
                    raise InputError(
                        f'{where}expected "text" or "messages" alone, as prompts and labels need --choices'
                    )
                yield Example(number, (_text(content, where, "text"),), None, path)
            else:
                label = _label(content, where, choices, labelled)
                yield Example(number, (_text(content, where, "prompt"),), label, path)


def _object(line: bytes, where: str, kind: str) -> dict[str, Any]:
    try:
        content = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}not UTF-8 text: {undecodable(error)}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}not JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise InputError(f"{where}not JSON that can be read: a number of thousands of digits") from None
    except RecursionError:
        raise InputError(f"{where}not JSON that can be read: brackets within a thousand brackets") from None
    if not isinstance(content, dict):
        raise InputError(f"{where}expected an object {{{_KEYS[kind]}}}, got {_json(content)}")
    return content


def _text(content: Mapping[str, Any], where: str, key: str) -> Content:
    """What stands under this key, or the chat under `messages`."""
    if key in content and "messages" in content:
        raise InputError(f'{where}expected "{key}" or "messages", got both')
    if "messages" in content:
        return _messages(content["messages"], "messages", where)
    if key not in content:
        raise InputError(f'{where}no "{key}" and no "messages"; its keys are {_keys(content)}')
    text = content[key]
    if not isinstance(text, str):
        chat = '; the messages of a chat go under "messages"' if isinstance(text, list) else ""
        raise InputError(f'{where}"{key}": expected text, got {_json(text)}{chat}')
    return text


def _pair(content: Mapping[str, Any], where: str) -> tuple[Content, ...]:
    """The two whole inputs of a pair, the chosen one first."""
    for side in SIDES:
        if side not in content:
            raise InputError(
                f'{where}no "{side}"; this model gives a text one score, and is asked about pairs {{"prompt": ..., '
                f'"chosen": ..., "rejected": ...}}; the keys are {_keys(content)}'
            )
    parts = {key: content[key] for key in ("prompt", *SIDES) if content.get(key) is not None or key in SIDES}
    if not any(isinstance(part, list) for part in parts.values()):
        for key, part in parts.items():
            if not isinstance(part, str):
                raise InputError(f'{where}"{key}": expected text, or a list of messages, got {_json(part)}')
        return tuple(parts.get("prompt", "") + parts[side] for side in SIDES)
    if any(isinstance(part, str) for part in parts.values()):
        kinds = " and ".join(f'"{key}" is {"text" if isinstance(p, str) else "a list"}' for key, p in parts.items())
        raise InputError(f"{where}expected texts only, or lists of messages only; {kinds}")
    chats = {key: _messages(part, key, where) for key, part in parts.items()}
    return tuple(chats.get("prompt", []) + chats[side] for side in SIDES)


def _messages(value: Any, key: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return value
    raise InputError(
        f'{where}"{key}": expected a list of messages {{"role": ..., "content": ...}}, both texts, got {_json(value)}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _label(content: Mapping[str, Any], where: str, choices: Sequence[str] | None, labelled: bool) -> int | None:
    label = None if choices is None else content.get("label")
    if label is not None and choices is not None:
        return _label_index(label, choices, where)
    if labelled:
        raise InputError(f'{where}no "label"; its keys are {_keys(content)}')
    return None


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


def _keys(content: Mapping[str, Any]) -> str:
    return ", ".join(map(_json, content)) or "none"


def _json(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def batches(
    examples: Sequence[Sequence[Sequence[int]]], size: int, pad_id: int, labels: Sequence[int] | None = None
) -> list[dict[str, Tensor]]:
    """Token ids as padded batches: `input_ids` and `attention_mask` `[N, T]`, and `labels` `[N]` if there are any.

    Pairs have `input_ids_chosen`, `attention_mask_chosen`, `input_ids_rejected` and `attention_mask_rejected`, either
    side of a width of its own.

    Padding is on the right, whatever the tokenizer's own side: a causal model's tokens never see what follows them, so
    it cannot matter, and positions come out right without the model's help.

    Args:
        examples: the inputs of each.
        size: of a batch.
        pad_id: what fills it up.
        labels: of the examples.
    """
    made = []
    for start in range(0, len(examples), size):
        piece = examples[start : start + size]
        ends = [""] if len(piece[0]) == 1 else [f"_{side}" for side in SIDES]
        batch: dict[str, Tensor] = {}
        for end, sequences in zip(ends, zip(*piece, strict=True), strict=True):
            batch[f"input_ids{end}"], batch[f"attention_mask{end}"] = _padded(sequences, pad_id)
        if labels is not None:
            batch["labels"] = torch.tensor(labels[start : start + size])
        made.append(batch)
    return made


def _padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return input_ids, mask
