"""The question "which module is this sentence from?": who is asked what, as prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bayesian_lora_kernels.demo.problem import NO_ANSWER, Example, Splits
from bayesian_lora_kernels.demo.sentences import Document, Module, Sentence
from bayesian_lora_kernels.demo.settings import CLASSES, FOREIGN, DemoSettings
from bayesian_lora_kernels.demo.tokenizer import QUESTION, build_tokenizer

MOST_TOKENS = 56  # of a sentence, before the question


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
        """Draw the sets, docstring by docstring: no sentence is in two, and of docstrings only those at the cuts."""
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
        return Splits(train, held_out, test, {"shift": shift}, foreign)

    def _examples(self, sentences: Sequence[Sentence], answer: int) -> list[Example]:
        if not sentences:
            return []
        start: int = self.tokenizer.bos_token_id
        encoded = self.tokenizer([" ".join(s) for s in sentences], add_special_tokens=False)["input_ids"]
        return [Example((start, *ids[:MOST_TOKENS], *self._question), answer) for ids in encoded]


def _flat(documents: Sequence[Document]) -> list[Any]:
    return [sentence for document in documents for sentence in document]
