"""The demo's question to a real language model: about rated sentences, or what a file of JSON lines asks."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.adapter import choose_device, context_length, loading_bar, pad_token
from bayesian_lora_kernels.commands.dataset import Content, Example, read_examples
from bayesian_lora_kernels.commands.errors import InputError, loading
from bayesian_lora_kernels.commands.inputs import check_vocabulary
from bayesian_lora_kernels.commands.tokens import choice_tokens, tokenise_prompts
from bayesian_lora_kernels.demo import problem, sentiment
from bayesian_lora_kernels.demo.language import TUNING, LanguageProblem, Question
from bayesian_lora_kernels.demo.ratings import FILE as RATINGS
from bayesian_lora_kernels.demo.ratings import read_ratings
from bayesian_lora_kernels.demo.smollm2 import load_smollm2

SMOLLM2 = "smollm2"
JSON_LINES = ".jsonl"
FEWEST = 60  # lines of a file
HELD_OUT, TEST = 0.2, 0.3  # of them
MOST_HELD_OUT, MOST_TEST = 100, 1000
SETS = ("train", "held_out", "test")  # beside those of --shift


@dataclass(frozen=True)
class _Data:
    """What is asked about what.

    Attributes:
        text: the question in words.
        titles: of the measured sets.
        draw: `{set: examples}` of a seed.
        choices: the answers, for a model with a chat template or without.
        prompt: what the model reads of a content, likewise.
    """

    text: str
    titles: Mapping[str, str]
    draw: Callable[[int], Mapping[str, Sequence[Example]]]
    choices: Callable[[bool], Sequence[str]]
    prompt: Callable[[Any, bool], Content]


def language_problem(args: Namespace) -> LanguageProblem:
    """What `blk demo` asks of `--model` about `--data`.

    Raises:
        InputError: for whatever the user has to put right.
        RuntimeError: if SmolLM2 is not there.
    """
    start = perf_counter()
    data = _json_lines(args) if args.data is not None and args.data.suffix == JSON_LINES else _ratings(args)
    read = perf_counter() - start
    model, tokenizer = _load(args.model, args.dtype, choose_device(args.device))
    chat = bool(getattr(tokenizer, "chat_template", None))
    choices = data.choices(chat)
    token_ids = choice_tokens(tokenizer, choices)
    limit = context_length(tokenizer, model.config)

    def encode(examples: Sequence[Example]) -> list[problem.Example]:
        asked = [replace(one, inputs=(data.prompt(one.inputs[0], chat),)) for one in examples]
        ids, truncated = tokenise_prompts(tokenizer, asked, limit)
        check_vocabulary(model, [prompt for (prompt,) in ids])
        if truncated:
            output.warn(f"{truncated} of {len(ids)} prompts are longer than {limit} tokens and lost their beginning")
        return [
            problem.Example(tuple(prompt), one.label)
            for (prompt,), one in zip(ids, examples, strict=True)
            if one.label is not None
        ]

    def splits(seed: int) -> problem.Splits:
        sets = {name: encode(examples) for name, examples in data.draw(seed).items()}
        sets["train"].sort(key=lambda example: -len(example.tokens))  # less padding in the batches of a fit
        return problem.Splits(sets.pop("train"), sets.pop("held_out"), sets.pop("test"), sets)

    return LanguageProblem(
        args.model,
        model,
        pad_token(tokenizer, model.config),
        Question(data.text, choices, token_ids, data.titles),
        splits,
        args.cache or args.out / "adapters",
        tuning=replace(TUNING, epochs=1) if args.quick else TUNING,
        seconds={"data": read, "base model": perf_counter() - start - read},
    )


def _ratings(args: Namespace) -> _Data:
    if args.choices is not None or args.shift:
        raise InputError(
            f"--choices and --shift: expected with --data FILE{JSON_LINES} only; rated sentences have both"
        )
    try:
        ratings = read_ratings(args.data or Path(RATINGS))
    except RuntimeError as error:
        raise InputError(error) from error
    sizes = sentiment.QUICK if args.quick else sentiment.Sizes()

    def draw(seed: int) -> dict[str, list[Example]]:
        sets = sentiment.draw(ratings, sizes, seed)
        return {
            name: [Example(i, (text,), label) for i, (text, label) in enumerate(labelled, start=1)]
            for name, labelled in sets.items()
        }

    return _Data(
        sentiment.TEXT,
        sentiment.TITLES,
        draw,
        sentiment.choices,
        sentiment.prompt,
    )


def _json_lines(args: Namespace) -> _Data:
    if args.choices is None or len(args.choices) < 2:
        raise InputError(f"--choices: expected the answers that labels of {args.data} stand for, at least two")
    lines = read_examples(args.data, args.choices, labelled=True)
    if len(lines) < FEWEST:
        raise InputError(
            f"{args.data}: expected at least {FEWEST} lines to learn from and to measure on, got {len(lines)}"
        )
    shifts: dict[str, list[Example]] = {}
    for path in args.shift:
        if path.stem in (*SETS, *shifts):
            raise InputError(f"--shift {path}: the name {path.stem!r} is taken; expected a file of another name")
        shifts[path.stem] = read_examples(path, args.choices, labelled=True)

    def draw(seed: int) -> dict[str, list[Example]]:
        shuffled = random.Random(seed).sample(lines, len(lines))
        held_out = min(int(HELD_OUT * len(lines)), MOST_HELD_OUT)
        test = held_out + min(int(TEST * len(lines)), MOST_TEST)
        return {"train": shuffled[test:], "held_out": shuffled[:held_out], "test": shuffled[held_out:test], **shifts}

    titles = {"test": f"test: {args.data.name}", **{path.stem: f"shift: {path.name}" for path in args.shift}}
    text = f"{args.data.name}: which of {', '.join(args.choices)}?"
    return _Data(text, titles, draw, lambda chat: args.choices, lambda content, chat: content)


def _load(name: str, dtype: str, device: torch.device) -> tuple[Any, Any]:
    """Model, in eval mode, and tokenizer."""
    with loading_bar(output.watched()):
        if name == SMOLLM2:
            model, tokenizer = load_smollm2()
        else:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            with loading(f"--model {name}"):
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    wanted = (torch.bfloat16 if device.type == "cuda" else torch.float32) if dtype == "auto" else getattr(torch, dtype)
    return model.to(device, wanted).eval(), tokenizer
