"""The question "which module is this sentence from?": who is asked what, as prompts and batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.demo.sentences import Document, Module, Sentence
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings
from bayesian_lora_kernels.demo.tokenizer import QUESTION, build_tokenizer

MOST_TOKENS = 56  # of a sentence, before the question
NO_ANSWER = -100

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """A prompt, its answer (an index into the classes, or a token, or `NO_ANSWER`), and the docstring it is from."""

    tokens: tuple[int, ...]
    answer: int
    document: tuple[int, int] | None = None  # class and number


@dataclass(frozen=True)
class Splits:
    """What fine-tuning and measuring see; the sets share no docstring."""

    train: list[Example]
    held_out: list[Example]
    test: list[Example]
    shift: list[Example]
    foreign: list[Example]


class Task:
    """Sentences, tokenizer and the base model's examples. Sentences of the classes are not among the latter.

    Args:
        modules: as `read_standard_library` gives them.
        settings: sizes.

    Raises:
        RuntimeError: if a class, or all of the foreign modules, have too few sentences.
    """

    def __init__(self, modules: Mapping[str, Module], settings: DemoSettings):
        self.settings = settings
        self.modules = modules
        needed = {"docstring": settings.train + settings.held_out + settings.test, "comment": settings.shift}
        for name in CLASSES:
            module = modules.get(name, Module(name))
            for kind, documents in (("docstring", module.docstrings), ("comment", module.comments)):
                if (there := len(_flat(documents))) < needed[kind]:
                    raise RuntimeError(f"{name}: expected {needed[kind]} {kind} sentences in this Python, got {there}")
        self._foreign = [s for name in FOREIGN if name in modules for s in _flat(modules[name].docstrings)]
        if len(self._foreign) < settings.foreign:
            raise RuntimeError(f"expected {settings.foreign} sentences of foreign modules, got {len(self._foreign)}")

        others = [module for name, module in modules.items() if name not in CLASSES and name not in FOREIGN]
        named = sorted(others, key=lambda module: (-module.size, module.name))[: settings.other_modules]
        names = [*CLASSES, *(module.name for module in named)]
        texts = [s for module in others for s in _flat([*module.docstrings, *module.comments])]
        self.tokenizer = build_tokenizer(texts, names, settings.base.vocabulary, settings.base.pieces)
        self.class_token_ids: list[int] = self.tokenizer.convert_tokens_to_ids(list(CLASSES))
        self._question: list[int] = self.tokenizer.convert_tokens_to_ids(list(QUESTION))
        answers = dict(
            zip((m.name for m in named), self.tokenizer.convert_tokens_to_ids(names[len(CLASSES) :]), strict=True)
        )
        self.base_examples = [
            example
            for module in others
            for example in self._examples(
                _flat([*module.docstrings, *module.comments]), answers.get(module.name, NO_ANSWER)
            )
        ]

    def splits(self, seed: int) -> Splits:
        """Draw the sets, docstring by docstring, so that no two sets share one."""
        rng = random.Random(seed)
        s = self.settings
        train, held_out, test, shift = [], [], [], []
        for index, name in enumerate(CLASSES):
            module = self.modules[name]
            documents = rng.sample(module.docstrings, len(module.docstrings))
            pool = self._examples(_flat(documents), index)
            sources = [number for number, document in enumerate(documents) for _ in document]
            pool = [replace(one, document=(index, number)) for one, number in zip(pool, sources, strict=True)]
            comments = self._examples(_flat(rng.sample(module.comments, len(module.comments))), index)
            train += pool[: s.train]
            held_out += pool[s.train : s.train + s.held_out]
            test += pool[s.train + s.held_out :][: s.test]
            shift += comments[: s.shift]
        foreign = self._examples(rng.sample(self._foreign, s.foreign), NO_ANSWER)
        return Splits(train, held_out, test, shift, foreign)

    def _examples(self, sentences: Sequence[Sentence], answer: int) -> list[Example]:
        if not sentences:
            return []
        start: int = self.tokenizer.bos_token_id
        encoded = self.tokenizer([" ".join(s) for s in sentences], add_special_tokens=False)["input_ids"]
        return [Example((start, *ids[:MOST_TOKENS], *self._question), answer) for ids in encoded]


def make_batch(examples: Sequence[Example], pad: int = 0) -> Batch:
    """`input_ids` and `attention_mask` `[N, T]`, padded on the left, and `labels` `[N]`."""
    longest = max(len(example.tokens) for example in examples)
    ids = torch.full((len(examples), longest), pad, dtype=torch.long)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, longest - len(example.tokens) :] = torch.tensor(example.tokens)
        mask[row, longest - len(example.tokens) :] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([example.answer for example in examples]),
    }


def in_order(examples: Sequence[Example], batch_size: int) -> list[Batch]:
    """Batches in the order of the examples."""
    return [make_batch(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]


def shuffled(examples: Sequence[Example], batch_size: int, rng: random.Random) -> Iterator[Batch]:
    """One epoch in random order; batches hold examples of similar length, so that there is little padding."""
    order = rng.sample(range(len(examples)), len(examples))
    groups = []
    window = 32 * batch_size
    for start in range(0, len(order), window):
        similar = sorted(order[start : start + window], key=lambda i: len(examples[i].tokens))
        groups += [similar[i : i + batch_size] for i in range(0, len(similar), batch_size)]
    rng.shuffle(groups)
    for group in groups:
        yield make_batch([examples[i] for i in group])


def _flat(documents: Sequence[Document]) -> list[Any]:
    return [sentence for document in documents for sentence in document]
