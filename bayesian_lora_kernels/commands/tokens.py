"""Prompts, texts and choices as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.dataset import SIDES, Content, Example
from bayesian_lora_kernels.commands.errors import InputError, brief, loading


class Inputs(NamedTuple):
    """Token ids of every input of every example, and how many examples were too long and lost some of them."""

    ids: list[tuple[list[int], ...]]
    truncated: int


def tokenise_prompts(tokenizer: Any, examples: Sequence[Example], max_length: int | None) -> Inputs:
    """Token ids of prompts that an answer follows, with the special tokens that the tokenizer puts before a text.

    Those that it puts after a text are left out, because the answer follows there. Of a prompt that is too long the
    end is kept, where the question is, and the special tokens before it. Messages become what the chat template makes
    of them, with the beginning of an answer.

    Raises:
        InputError: if a prompt has no tokens, `max_length` leaves room for none, or the template does not serve.
    """
    texts = [_text(tokenizer, example.inputs[0], example.where, answer=True) for example in examples]
    plain = _ids(tokenizer, texts, special=False)
    chats = [not isinstance(example.inputs[0], str) for example in examples]
    first = next((i for i, ids in enumerate(plain) if ids and not chats[i]), None)
    prefix = [] if first is None else _prefix(tokenizer, texts[first], plain[first])
    ids: list[tuple[list[int], ...]] = []
    truncated = 0
    for example, tokens, chat in zip(examples, plain, chats, strict=True):
        before = prefix
        if chat:  # whose template writes the special tokens itself
            before, tokens = (tokens[:1], tokens[1:]) if tokens[:1] == [tokenizer.bos_token_id] else ([], tokens)
        if not tokens and not before:
            raise InputError(f"{example.where}: the prompt {example.inputs[0]!r} has no tokens")
        room = None if max_length is None else max_length - len(before)
        if room is not None and room < 1:
            raise InputError(f"--max-length: expected more than {len(before)}, the special tokens alone take those")
        if room is not None and len(tokens) > room:
            tokens, truncated = tokens[-room:], truncated + 1
        ids.append((before + tokens,))
    return Inputs(ids, truncated)


def tokenise_texts(tokenizer: Any, examples: Sequence[Example], max_length: int | None) -> Inputs:
    """Token ids of whole texts as the tokenizer makes them, with all its special tokens, as a classifier is trained.

    One that is too long is truncated by the tokenizer, on its own side. Messages become what the chat template makes
    of them, special tokens and all.

    Raises:
        InputError: if a text has no tokens, `max_length` leaves room for none, the template does not serve, or nothing
            distinguishes the two of a pair.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length is not None and max_length <= special:
        raise InputError(f"--max-length: expected more than {special}, the special tokens alone take those")
    contents = [(content, example.where) for example in examples for content in example.inputs]
    texts = [_text(tokenizer, content, where, answer=False) for content, where in contents]
    every, kept = (_whole(tokenizer, contents, texts, limit) for limit in (None, max_length))
    ids: list[tuple[list[int], ...]] = []
    truncated, start = 0, 0
    for example in examples:
        rows = slice(start, start + len(example.inputs))
        parts, cut, start = tuple(kept[rows]), kept[rows] != every[rows], rows.stop
        if not all(parts):
            raise InputError(f"{example.where}: the text {example.inputs[parts.index([])]!r} has no tokens")
        if len(parts) > 1 and parts[0] == parts[1]:
            within = f" within {max_length} tokens (--max-length)" if cut else ""
            raise InputError(f"{example.where}: {' and '.join(SIDES)} are the same{within}, expected two answers")
        truncated += cut
        ids.append(parts)
    return Inputs(ids, truncated)


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


def tokenise_text(tokenizer: Any, text: str, where: str = "the text") -> Text:
    """Tokens of a text and the parts of it that they stand for; `where` it is, an error says.

    Raises:
        InputError: if it has no tokens.
    """
    fast = bool(tokenizer.is_fast)
    options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    with loading("tokenizer", "used"):
        encoded = tokenizer(text, return_offsets_mapping=fast, **options)
    ids = list(encoded["input_ids"])
    if not ids:
        raise InputError(f"{where}: it has no tokens")
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
    """The token that each choice begins with, with a warning on stderr about choices of more than one token.

    Raises:
        InputError: if a choice has no token or one that stands for anything unknown, or if two begin with the same.
    """
    owners: dict[int, str] = {}
    longer = []
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
                f"{token_text(tokenizer, token)!r}; they must differ in the first token, whose logit alone stands for "
                f"a choice, which {_hint([owners[token], choice])} may change"
            )
        owners[token] = choice
        if len(ids) > 1:
            longer.append(f"{choice!r} has {len(ids)} tokens and stands for {token_text(tokenizer, token)!r}")
    if longer:
        output.warn(f"--choices: only the first token of a choice counts; {', '.join(longer)}")
    return list(owners)


def token_text(tokenizer: Any, token: int) -> str:
    """How the vocabulary writes a token."""
    return str(tokenizer.convert_ids_to_tokens(token))


def _hint(choices: Sequence[str]) -> str:
    if any(choice.startswith(" ") for choice in choices):
        return f"leaving out the leading space ({choices[0].lstrip()!r})"
    return f"a leading space ({' ' + choices[0]!r})"


def _text(tokenizer: Any, content: Content, where: str, answer: bool) -> str:
    """What a text is, or what the chat template makes of messages; with the beginning of an answer if one follows.

    Raises:
        InputError: if there is no template, or it refuses these messages; if the answer is there already.
    """
    if isinstance(content, str):
        return content
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"{where}: these are messages, and the tokenizer has no chat template; write the whole text as the "
            "model was trained on it"
        )
    if answer and content[-1]["role"] == "assistant":
        raise InputError(f"{where}: the last message is the assistant's, but the choices are what it says next")
    try:
        return str(tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=answer))
    except Exception as error:  # templates are programs, which raise what they like
        raise InputError(f"{where}: the tokenizer's chat template does not take it: {brief(error)}") from error


def _ids(tokenizer: Any, texts: list[str], special: bool, max_length: int | None = None) -> list[list[int]]:
    with loading("tokenizer", "used"):
        encoded = tokenizer(
            texts,
            add_special_tokens=special,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            verbose=False,
        )
    return [list(ids) for ids in encoded["input_ids"]]


def _whole(
    tokenizer: Any, contents: Sequence[tuple[Content, str]], texts: Sequence[str], max_length: int | None
) -> list[list[int]]:
    """Token ids of texts, with special tokens where no chat template has written them already."""
    ids: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        rows = [i for i, (content, _) in enumerate(contents) if isinstance(content, str) == special]
        if rows:
            for i, found in zip(rows, _ids(tokenizer, [texts[i] for i in rows], special, max_length), strict=True):
                ids[i] = found
    return ids


def _prefix(tokenizer: Any, text: str, plain: list[int]) -> list[int]:
    """The special tokens before a text, of which `plain` are its own."""
    whole = _ids(tokenizer, [text], special=True)[0]
    for start in range(len(whole) - len(plain), -1, -1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start]
    raise InputError("tokenizer: it splits a text differently with special tokens and without, which is not supported")
