"""Sentiment: is a sentence of a movie review negative or positive? Shift: Amazon reviews, editorials, tweets."""

from __future__ import annotations

import copy
import random
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayesian_lora_kernels.demo.ratings import DOWNLOAD, FILES, LABELS, read_ratings
from bayesian_lora_kernels.demo.sentiment import prompt
from bayesian_lora_kernels.demo.smollm2 import load_smollm2

from .causal import NextToken
from .encoder import TextTask, sequence_classifier
from .foreign import library_sentences
from .task import Example, MissingPackage, Splits, Task, Training


class Sentiment(Task):
    """Every sentence is a document; either label is as frequent in every set.

    Attributes:
        train: sentences, and so on; `shift` of each kind.
    """

    n_classes = len(LABELS)
    train, held_out, test, shift, foreign = 240, 100, 300, 80, 200

    def __init__(self, cache: Path, ratings: Path | None):
        super().__init__(cache)
        self.ratings = ratings

    @cached_property
    def sentences(self) -> dict[str, list[tuple[str, int]]]:
        """`{kind: [(sentence, label)]}`."""
        if self.ratings is None:
            raise MissingPackage(f"{self.name}: expected --ratings FILE; get it with {DOWNLOAD}")
        return read_ratings(self.ratings)

    def make(self, seed: int) -> Splits:
        rng = random.Random(seed)
        seen: set[str] = set()
        pools: dict[str, list[list[Example]]] = {}
        for kind, sentences in self.sentences.items():
            fresh = [(text, label) for text, label in sentences if text not in seen]
            seen.update(text for text, _ in fresh)
            shuffled = [Example(text, label, text) for text, label in rng.sample(fresh, len(fresh))]
            pools[kind] = [[one for one in shuffled if one.label == label] for label in range(self.n_classes)]

        def taken(kind: str, count: int) -> list[Example]:
            pool = pools[kind]
            chosen = [one for own in pool for one in own[: count // self.n_classes]]
            for own in pool:
                del own[: count // self.n_classes]
            return rng.sample(chosen, len(chosen))

        train, held_out, test = (taken("movies", count) for count in (self.train, self.held_out, self.test))
        shift = [one for kind in FILES if kind != "movies" for one in taken(kind, self.shift)]
        return Splits(train, held_out, test, rng.sample(shift, len(shift)), library_sentences(self.foreign, seed))


class SentimentEncoder(Sentiment, TextTask):
    """MiniLM, as a sequence classifier."""

    name = "sentiment-minilm"
    training = Training(epochs=8, learning_rate=5e-3)
    last_layer = r".*classifier.*"  # the whole of it is trained
    longest = 40

    def build(self, seed: int) -> nn.Module:
        return sequence_classifier(self.folder, self.n_classes, seed)


class SentimentLM(Sentiment, NextToken):
    """SmolLM2-135M-Instruct, asked in its chat template."""

    name = "sentiment-smollm2"
    training = Training(epochs=4, learning_rate=1e-3, batch_size=8, weight_decay=0.0)
    batch_size = 8
    last_layer = r".*\.layers\.29\..*"  # LoRA on its q and v
    train, held_out, test, shift, foreign = 160, 100, 150, 60, 100

    @cached_property
    def pretrained(self) -> tuple[nn.Module, Any]:
        """The model and its tokenizer."""
        try:
            return load_smollm2()
        except RuntimeError as error:
            raise MissingPackage(str(error)) from None

    @property
    def class_token_ids(self) -> list[int]:  # type: ignore[override]
        return [self.pretrained[1].encode(label, add_special_tokens=False)[0] for label in LABELS]

    @property
    def pad(self) -> int:  # type: ignore[override]
        return self.pretrained[1].pad_token_id or 0

    def tokens(self, examples: list[Example]) -> list[Any]:  # type: ignore[override]
        tokenizer = self.pretrained[1]
        texts = [
            tokenizer.apply_chat_template(self.question(one.content), add_generation_prompt=True, tokenize=False)
            for one in examples
        ]
        return list(tokenizer(texts, add_special_tokens=False)["input_ids"])

    def question(self, sentence: str) -> Any:
        """As messages of a chat."""
        return prompt(sentence, chat=True)

    def build(self, seed: int) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        base = copy.deepcopy(self.pretrained[0])
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return get_peft_model(base, config)


class SentimentChoices(SentimentLM):
    """The same model, asked as BayesAdapt asks: lettered choices, and the letter as the answer."""

    name = "choices-smollm2"
    training = Training(epochs=3, learning_rate=1e-3, batch_size=8, weight_decay=0.0)
    train, held_out, test, shift, foreign = 96, 60, 120, 12, 12
    letters = ("A", "B")

    @property
    def class_token_ids(self) -> list[int]:  # type: ignore[override]
        return [self.pretrained[1].encode(letter, add_special_tokens=False)[0] for letter in self.letters]

    def question(self, sentence: str) -> list[dict[str, str]]:
        choices = "\n".join(f"{letter}) {label}" for letter, label in zip(self.letters, LABELS, strict=True))
        text = f"Which choice describes the sentence? Reply with its letter only.\n{sentence}\nChoices:\n{choices}"
        return [{"role": "user", "content": text}]
