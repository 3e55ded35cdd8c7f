"""When a model is checked, and what was found out: where its layers have the examples, which tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from bayesian_lora_kernels.model.layouts import WHOLE, Layout, layouts
from bayesian_lora_kernels.model.masks import RELATIONS, TokenMask, by_example

CHECKED = {1, *(2 * 16**k for k in range(16))}  # which of the batches of a kind are checked: first often, then seldom
SAME = "the same"
ENOUGH = 4  # times that something was found, for it to be believed of batches that differ in the number of tokens


@dataclass
class Checks:
    """When to check, and what has been checked.

    Attributes:
        mode: `first`: the first two batches of every kind, the 32nd, the 512th and so on; `always`; `off`.
        seen: `{kind of batch: how many of them}`.
        unchecked: captures of several examples that were believed without a check.
        steady: whether what was found out about one batch has so far been true of the next.
    """

    mode: str = "first"
    seen: dict[Any, int] = field(default_factory=dict)
    unchecked: int = 0
    steady: bool = True

    def due(self, kind: Any) -> str:
        """Which check a batch of this kind is to have: `thorough`, `quick` or none; counts it."""
        self.seen[kind] = count = self.seen.get(kind, 0) + 1
        if self.mode == "off":
            return ""
        if count == 1 or self.mode == "always" or not self.steady:
            return "thorough"
        return "quick" if count in CHECKED else ""

    def changes(self, what: str) -> None:
        """Something differs from batch to batch: from here on every one of them is checked.

        Raises:
            ValueError: if batches have been measured in the belief that it does not.
        """
        self.steady = False
        if self.unchecked and self.mode == "first":
            raise ValueError(
                f"{what} changes from batch to batch, and batches before this one were measured without a check; start "
                "again with check='always'"
            )


@dataclass(frozen=True)
class Way:
    """How a causal LM is run.

    Attributes:
        skips_padding: whether it is handed position ids that skip padding on the left.
        cuts_positions: whether its output head is handed only the positions that are used, or all of them, because the
            logits are changed afterwards in a way that depends on the position.
    """

    skips_padding: bool = True
    cuts_positions: bool = True


@dataclass
class Relation:
    """How the tokens of a layer's call follow from those of a mask.

    Attributes:
        name: of RELATIONS; None if they have nothing to do with the mask.
        seen: for which numbers of tokens (for None), or of tokens beyond those of the mask, a check has shown it.
        shown: how often.
    """

    name: str | None = SAME
    seen: set[int] = field(default_factory=lambda: {0})
    shown: int = 0

    def holds(self, tokens: int, masked: int) -> bool:
        """Whether it has been shown for as many tokens, with a mask of so many."""
        if tokens < masked and self.shown < ENOUGH:  # a choice of tokens may look so by chance
            return False
        if self.name is None:
            return tokens in self.seen or len(self.seen) >= ENOUGH
        return tokens - masked in self.seen


@dataclass
class Findings:
    """Of one model under one forward; batches of every size and length share them.

    Attributes:
        layouts: `{layer: one for each of its calls}`, as far as batches of several examples have shown them.
        grouped: of which layers how many batches with several rows for each example have shown the layout.
        relations: `{layer: one for each of its calls}`, how its tokens follow from those of the mask.
        unclear: `{layer: why it is not known which of its tokens are padding}`.
        guesses: whether a run of pad tokens that nobody calls padding is taken for it.
        one_at_a_time: whether examples run one by one, because some layer does not tell them apart.
        way: of running the model.
    """

    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    grouped: dict[str, int] = field(default_factory=dict)
    relations: dict[str, list[Relation]] = field(default_factory=dict)
    unclear: dict[str, str] = field(default_factory=dict)
    guesses: bool = True
    one_at_a_time: bool = False
    way: Way = Way()

    def state(self) -> dict[str, Any]:
        """Of numbers, strings and containers."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        layouts = {name: [(one.axis, one.blocks) for one in calls] for name, calls in self.layouts.items()}
        relations = {
            name: [(one.name, sorted(one.seen), one.shown) for one in calls] for name, calls in self.relations.items()
        }
        way = self.way.skips_padding, self.way.cuts_positions
        return {**found, "layouts": layouts, "relations": relations, "way": way}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` said takes the place of everything that was found."""
        for key, value in state.items():
            setattr(self, key, value)
        self.layouts = {name: [Layout(*one) for one in calls] for name, calls in state["layouts"].items()}
        self.relations = {
            name: [Relation(one, set(seen), shown) for one, seen, shown in calls]
            for name, calls in state["relations"].items()
        }
        self.way = Way(*state["way"])

    def layout(self, name: str, call: int, shape: Sequence[int], n: int) -> Layout | None:
        """How to read a layer's input of this shape as N examples; None if that is not possible."""
        if n == 1:
            return WHOLE
        known = self.known_layout(name, call, shape, n)
        return known or next(iter(layouts(shape, n)), None)

    def known_layout(self, name: str, call: int, shape: Sequence[int], n: int) -> Layout | None:
        """The same, if a check has shown it."""
        if n == 1:
            return WHOLE
        if name not in self.layouts:
            return None
        found = self.layouts[name]
        layout = found[min(call, len(found) - 1)]
        return layout if layout.fits(shape, n) else None

    def is_settled(self, name: str, call: int, shape: Sequence[int], n: int) -> bool:
        """Whether the layout of an input of this shape needs no further check."""
        layout = self.known_layout(name, call, shape, n)
        if layout is None or n == 1:
            return layout is not None
        enough = ENOUGH if len(shape) == 2 else 1  # rows [N k, d] may be a choice of tokens that came out even
        return layout.groups(shape, n) == 1 or self.grouped.get(name, 0) >= enough

    def relation(self, name: str, call: int) -> Relation:
        """How the tokens of a layer's call follow from those of a mask."""
        found = self.relations.get(name)
        return found[min(call, len(found) - 1)] if found else Relation()

    def relate(self, name: str, call: int, calls: int, relation: str | None, tokens: int, masked: int) -> None:
        """Write down how the tokens of one of a layer's calls follow from those of a mask."""
        found = self.relations.setdefault(name, [])
        found += [Relation() for _ in range(calls - len(found))]
        if found[call].name != relation:
            found[call] = Relation(relation, set())
        found[call].seen.add(tokens if relation is None else tokens - masked)
        found[call].shown += 1

    def is_told(
        self,
        name: str,
        call: int,
        calls: int,
        masks: Sequence[TokenMask],
        shape: Sequence[int],
        layout: Layout,
        n: int,
    ) -> bool:
        """Whether it is known which tokens of a layer's input are padding; its only token, in its only call, is not."""
        tokens = _product(shape[:-1]) // n
        if (tokens == 1 and calls == 1) or not any(mask.padded for mask in masks):
            return True
        relation = self.relation(name, call)
        for mask in masks:
            valid = by_example(mask.valid, shape, layout, n)
            if valid is not None and relation.holds(tokens, valid.shape[1]):
                return True
        return False

    def mask(
        self, name: str, call: int, masks: Sequence[TokenMask], shape: Sequence[int], layout: Layout, n: int
    ) -> Tensor | None:
        """`[N, T]`, which tokens of a layer's input count; None: all of them."""
        relation = self.relation(name, call).name
        if relation is None:
            return None
        tokens = _product(shape[:-1]) // n
        for mask in masks:
            if mask.guessed and not self.guesses:
                return None
            valid = by_example(mask.valid, shape, layout, n)
            found = None if valid is None else RELATIONS[relation](valid, tokens)
            if found is not None:
                return found if mask.padded else None
        return None


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
