"""Prompts and choices as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bayesian_lora_kernels.commands.dataset import Example
from bayesian_lora_kernels.commands.errors import InputError


class Prompts(NamedTuple):
    """Token ids of every prompt, and how many prompts were too long and lost their beginning."""

    ids: list[list[int]]
    truncated: int


def tokenise_prompts(tokenizer: Any, examples: Sequence[Example], max_length: int | None) -> Prompts:
    """Token ids of the prompts, with the special tokens that the tokenizer puts before a text.

    Those that it puts after a text are left out, because the answer follows there. Of a prompt that is too long the
    end is kept, where the question is, and the special tokens before it.

    Raises:
        InputError: if a prompt has no tokens, or `max_length` leaves room for none.
    """
    plain = _ids(tokenizer, [example.prompt for example in examples], special=False)
    first = next((i for i, ids in enumerate(plain) if ids), None)
    prefix = [] if first is None else _prefix(tokenizer, examples[first].prompt, plain[first])
    room = None if max_length is None else max_length - len(prefix)
    if room is not None and room < 1:
        raise InputError(f"--max-length: expected more than {len(prefix)}, the special tokens alone take those")
    ids, truncated = [], 0
    for example, tokens in zip(examples, plain, strict=True):
        if not tokens and not prefix:
            raise InputError(f"line {example.line}: the prompt {example.prompt!r} has no tokens")
        if room is not None and len(tokens) > room:
            tokens, truncated = tokens[-room:], truncated + 1
        ids.append(prefix + tokens)
    return Prompts(ids, truncated)


class Text(NamedTuple):
    """A text as tokens.

    Attributes:
        prefix: special tokens that the tokenizer puts before a text.
        ids: the text's own tokens.
        pieces: what each of them stands for; together they are the text, as far as the tokenizer keeps it. A token
            that is part of a character has an empty piece after the first one of it.
    """

    prefix: list[int]
    ids: list[int]
    pieces: list[str]


def tokenise_text(tokenizer: Any, text: str) -> Text:
    """Tokens of a text and the parts of it that they stand for.

    Raises:
        InputError: if it has no tokens.
    """
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=False, padding=False, verbose=False, return_offsets_mapping=fast
    )
    ids = list(encoded["input_ids"])
    if not ids:
        raise InputError("the text has no tokens")
    prefix = _prefix(tokenizer, text, ids)
    if not fast:
        return Text(prefix, ids, [tokenizer.decode([token]) for token in ids])
    ends = [end for _, end in encoded["offset_mapping"]]
    pieces, done = [], 0
    for i, end in enumerate(ends):
        end = max(done, len(text) if i == len(ends) - 1 else end)
        pieces.append(text[done:end])
        done = end
    return Text(prefix, ids, pieces)


def choice_tokens(tokenizer: Any, choices: Sequence[str]) -> list[int]:
    """The token that each choice begins with.

    Raises:
        InputError: if a choice has no token or one that stands for anything unknown, or if two begin with the same.
    """
    owners: dict[int, str] = {}
    for choice, ids in zip(choices, _ids(tokenizer, list(choices), special=False), strict=True):
        if not ids:
            raise InputError(f"--choices: {choice!r} has no token in this model's vocabulary")
        token = ids[0]
        if token == tokenizer.unk_token_id:
            raise InputError(
                f"--choices: {choice!r} is not in this model's vocabulary; {_hint([choice])} may change that"
            )
        if token in owners:
            raise InputError(
                f"--choices: {owners[token]!r} and {choice!r} begin with the same token "
                f"{token_text(tokenizer, token)!r}; they must differ in the first token, which "
                f"{_hint([owners[token], choice])} may change"
            )
        owners[token] = choice
    return list(owners)


def token_text(tokenizer: Any, token: int) -> str:
    """How the vocabulary writes a token."""
    return str(tokenizer.convert_ids_to_tokens(token))


def _hint(choices: Sequence[str]) -> str:
    if any(choice.startswith(" ") for choice in choices):
        return f"leaving out the leading space ({choices[0].lstrip()!r})"
    return f"a leading space ({' ' + choices[0]!r})"


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=special, truncation=False, padding=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]


def _prefix(tokenizer: Any, text: str, plain: list[int]) -> list[int]:
    """The special tokens before a text, of which `plain` are its own."""
    whole = _ids(tokenizer, [text], special=True)[0]
    for start in range(len(whole) - len(plain), -1, -1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise InputError("tokenizer: it splits a text differently with special tokens and without, which is not supported")
