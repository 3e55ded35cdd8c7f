"""Diseases: which chapter of the ICD-10-CM is a diagnosis from? Shift: what doctors call it instead of the title."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Any

from torch import nn

from .encoder import TextTask, mean_pooled
from .foreign import library_sentences
from .task import Example, Splits, Training, drawn, imported, shares

CHAPTERS = {
    "1": "infections",
    "6": "nervous system",
    "9": "circulation",
    "11": "digestion",
    "12": "skin",
    "14": "genitourinary",
    "17": "congenital",
    "18": "symptoms",
}
TRAIN, HELD_OUT, TEST, SHIFT, FOREIGN = 300, 100, 315, 300, 200


class Diseases(TextTask):
    """A category (three characters, such as K21) is a document; one title of each is used."""

    name = "diseases"
    n_classes = len(CHAPTERS)
    training = Training(epochs=10, learning_rate=5e-3)
    last_layer = r".*\.head\..*"  # the whole of it is trained

    @cached_property
    def texts(self) -> tuple[list[Example], list[Example]]:
        """All titles, and all inclusion terms that are no title; each text once."""
        icd: Any = imported("simple_icd_10_cm", "simple-icd-10-cm")
        labels = {chapter: label for label, chapter in enumerate(CHAPTERS)}
        seen: set[str] = set()
        titles: list[Example] = []
        terms: list[Example] = []
        codes = [code for code in icd.get_all_codes(True) if icd.is_category_or_subcategory(code)]
        for found, read in ((titles, lambda code: [icd.get_description(code)]), (terms, icd.get_inclusion_term)):
            for code in codes:
                above = [code, *icd.get_ancestors(code)]
                if above[-1] not in labels:
                    continue
                category = next(one for one in above if icd.is_category(one))
                for text in read(code):
                    plain = " ".join(text.lower().split())
                    if plain not in seen:
                        seen.add(plain)
                        found.append(Example(text, labels[above[-1]], category))
        return titles, terms

    def make(self, seed: int) -> Splits:
        rng = random.Random(seed)
        titles, terms = self.texts
        categories = shares((title.source for title in titles), (TRAIN, HELD_OUT, TEST), rng)
        train, held_out, test = (
            drawn([title for title in titles if title.source in part], count, rng, per_source=1)
            for part, count in zip(categories, (TRAIN, HELD_OUT, TEST), strict=True)
        )
        shift = drawn([term for term in terms if term.source in categories[2]], SHIFT, rng, per_source=3)
        return Splits(train, held_out, test, shift, library_sentences(FOREIGN, seed))

    def build(self, seed: int) -> nn.Module:
        return mean_pooled(self.folder, self.n_classes, seed)
