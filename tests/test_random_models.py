"""Random small models of layers that keep the package's assumptions, or break them in all the ways we know.

Every model is either served with autograd's numbers or refused with one of the promised errors; it is never wrong, and
no other exception gets out. `-s` prints which kinds were served and which refused.
"""

from __future__ import annotations

import collections
import os
import random
from dataclasses import dataclass
from typing import Any

import hypothesis
import pytest
import torch
from dense import relative
from hypothesis import strategies as st
from situations import (
    Scene,
    attempt,
    deviations,
    floats,
    ours,
    padded_row,
    plain_module,
)
from torch import Tensor, nn

WIDTH = 4
ORDINARY = int(os.environ.get("BLK_RANDOM_MODELS", "60"))
MANY = 2000


class State:
    """What goes through a model: tokens `[N, T, d]` and the mask that belongs to them."""

    def __init__(self, x: Tensor, mask: Tensor | None):
        self.x, self.mask = x, mask


class Step(nn.Module):
    """One layer of a random model: from a State to a State with tokens `[N, T, d]`."""

    harmless = False  # keeps every assumption
    interacts = False  # no number would be right
    called = True  # its layers' weights act in their own calls and nowhere else

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, s: State) -> State:
        return State(self.tokens(s.x), s.mask)

    def tokens(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Plain(Step):
    harmless = True

    def tokens(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Bottleneck(Step):
    """As LoRA: a narrow layer and one without a bias."""

    harmless = True

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, WIDTH, bias=False)

    def tokens(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.up(self.linear(x)))


class SeveralTimes(Step):
    harmless = True

    def tokens(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.linear(x)) + 0.5 * x
        return x


class TimeInPieces(Step):
    """Calls with a part of the positions each, whose mask the batch does not have."""

    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.linear(part)) for part in x.split(2, dim=1)], dim=1)


class Flat(Step):
    harmless = True

    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.flatten(0, 1))).unflatten(0, x.shape[:2])


class InPlace(Step):
    """Goes on in place after the layer."""

    harmless = True

    def tokens(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh_() + x


class TimeFirst(Step):
    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.transpose(0, 1))).transpose(0, 1)


class FlatTimeFirst(Step):
    def tokens(self, x: Tensor) -> Tensor:
        t, n = x.shape[1], x.shape[0]
        return torch.tanh(self.linear(x.transpose(0, 1).flatten(0, 1))).view(t, n, WIDTH).transpose(0, 1)


class Transposed(Step):
    """A layer along the columns of `[N, d, T]`, read as rows: the width is the last dimension of [N, d, d] only."""

    def tokens(self, x: Tensor) -> Tensor:
        square = x.mT @ x / x.shape[1]
        return x @ torch.tanh(self.linear(square.transpose(0, 1))).transpose(0, 1)


class Reordered(Step):
    """Examples in an order that depends on what is in them."""

    def tokens(self, x: Tensor) -> Tensor:
        order = x[:, 0, 0].argsort()
        return torch.tanh(self.linear(x[order]))[order.argsort()]


class Reversed(Step):
    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.flip(0))).flip(0)


class Rolled(Step):
    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.roll(1, 0))).roll(-1, 0)


class ReversedTime(Step):
    """Tokens in another order, which is nobody's business: but a mask does not go with them."""

    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.flip(1))).flip(1)


class Table(Step):
    """A table that all examples share, of 3 or 4 rows: N or T by coincidence."""

    def __init__(self, other: nn.Linear | None = None, rows: int = 3):
        super().__init__()
        self.register_buffer("grid", floats(rows, WIDTH))

    def tokens(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.grid)).mean(dim=0) * x


class WiderTable(Table):
    def __init__(self, other: nn.Linear | None = None):
        super().__init__(other, rows=6)


class Constant(Step):
    """The same with one row: `[d]`."""

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.register_buffer("code", floats(WIDTH))

    def tokens(self, x: Tensor) -> Tensor:
        return x * torch.tanh(self.linear(self.code))


class Pairs(Step):
    """Every example and its mirror image as one batch of 2 N."""

    def tokens(self, x: Tensor) -> Tensor:
        left, right = torch.tanh(self.linear(torch.cat([x, -2 * x]))).chunk(2)
        return left - 0.5 * right


class PairsInterleaved(Step):
    def tokens(self, x: Tensor) -> Tensor:
        both = torch.tanh(self.linear(torch.stack([x, -2 * x], dim=1).flatten(0, 1))).unflatten(0, (len(x), 2))
        return both[:, 0] - 0.5 * both[:, 1]


class PooledPairs(Step):
    """Pairs of `[2 N, d]`: rows that divide by N."""

    def tokens(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=1)
        left, right = torch.tanh(self.linear(torch.cat([pooled, -2 * pooled]))).chunk(2)
        return x * (left - 0.5 * right)[:, None]


class Folded(Step):
    """Tokens folded into the batch: `[N T, 1, d]`, or `[T N, 1, d]`."""

    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x.reshape(-1, 1, WIDTH))).view(x.shape)


class Routed(Step):
    """Tokens go to one of two experts by their sign."""

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def tokens(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        result = torch.zeros_like(flat)
        for expert, rows in ((self.linear, flat[:, 0] > 0), (self.other, flat[:, 0] <= 0)):
            index = rows.nonzero()[:, 0]
            if len(index):
                result = result.index_copy(0, index, torch.tanh(expert(flat[index])))
        return result.view(x.shape)


class RoutedExamples(Step):
    """Whole examples go to one of two experts."""

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def tokens(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert, rows in ((self.linear, x[:, 0, 0] > 0), (self.other, x[:, 0, 0] <= 0)):
            index = rows.nonzero()[:, 0]
            if len(index):
                result = result.index_copy(0, index, torch.tanh(expert(x[index])))
        return result


class BestTokens(Step):
    """One token of every example, but the examples in the order of how much they want it: exactly N rows."""

    def tokens(self, x: Tensor) -> Tensor:
        best = x[torch.arange(len(x)), x[:, :, 0].argmax(dim=1)]
        order = best[:, 1].argsort()
        return x + torch.tanh(self.linear(best[order]))[order.argsort()][:, None]


class ExamplesInPieces(Step):
    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([torch.tanh(self.linear(part)) for part in x.split(2)])


class OneByOne(Step):
    def tokens(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(self.linear(row)) for row in x])


class WeightAgain(Step):
    """The weight is used a second time by a function."""

    called = False

    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + torch.sin(x @ self.linear.weight)


class WeightOnly(Step):
    called = False

    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.linear.weight.T + self.linear.bias)


class OthersWeight(Step):
    """The weight of the layer before it, by function."""

    called = False

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.before = [other]  # no second name for it

    def tokens(self, x: Tensor) -> Tensor:
        (other,) = self.before
        hidden = torch.tanh(self.linear(x))
        return hidden if other is None or other.weight.shape[0] != WIDTH else hidden + 0.3 * (x @ other.weight.T)


class OthersLayer(Step):
    """The layer before it once more: one module under two names."""

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.again = other if other is not None and other.out_features == WIDTH else None

    def tokens(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        return hidden if self.again is None else hidden + torch.sin(self.again(x))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(torch.sin(x))


class Subclass(Step):
    called = False

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.linear = Scaled(WIDTH, WIDTH)

    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Hooked(Step):
    """A hook of the user's changes the output."""

    def __init__(self, other: nn.Linear | None = None):
        super().__init__()
        self.linear.register_forward_hook(lambda module, args, output: 2 * output)

    def tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Mixed(Step):
    """Every token sees all tokens before it; the padding on the right is seen by nobody."""

    harmless = True

    def tokens(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)).cumsum(dim=1) / 3


class Backwards(Step):
    """Every token sees all tokens after it, the padding too."""

    def tokens(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)).flip(1).cumsum(dim=1).flip(1) / 3


class Neighbours(Step):
    """A convolution over time leaks one position of padding."""

    def tokens(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        return hidden + 0.3 * nn.functional.pad(hidden, (0, 0, 0, 1))[:, 1:]


class ClassToken(Step):
    """One more position in front, whose mask the batch does not have."""

    def forward(self, s: State) -> State:
        x = torch.cat([torch.ones_like(s.x[:, :1]), s.x], dim=1)
        mask = None if s.mask is None else torch.cat([torch.ones_like(s.mask[:, :1]), s.mask], dim=1)
        return State(torch.tanh(self.linear(x)), mask)


class MeanSubtracted(Step):
    interacts = True

    def tokens(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        return hidden - 0.5 * hidden.mean(dim=0)


class FromNeighbour(Step):
    interacts = True

    def tokens(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        return hidden + 0.3 * hidden.roll(1, 0)


STEPS: list[type[Step]] = [
    Plain,
    Bottleneck,
    SeveralTimes,
    TimeInPieces,
    Flat,
    InPlace,
    Mixed,
    TimeFirst,
    FlatTimeFirst,
    Transposed,
    Reordered,
    Reversed,
    Rolled,
    ReversedTime,
    Table,
    WiderTable,
    Constant,
    Pairs,
    PairsInterleaved,
    PooledPairs,
    Folded,
    Routed,
    RoutedExamples,
    BestTokens,
    ExamplesInPieces,
    OneByOne,
    WeightAgain,
    WeightOnly,
    OthersWeight,
    OthersLayer,
    Subclass,
    Hooked,
    Backwards,
    Neighbours,
    ClassToken,
    MeanSubtracted,
    FromNeighbour,
]
HARMLESS = [s for s in STEPS if s.harmless]
POOLS = ("mean", "masked mean", "masked maximum", "last valid", "first", "last", "maximum", "sum")
SAFE_POOLS = ("masked mean", "last valid", "first")


@dataclass(frozen=True)
class Recipe:
    """What is drawn, and printed when something fails."""

    steps: tuple[str, ...]
    pool: str
    classes: int
    regression: bool
    shapes: tuple[tuple[int, int], ...]  # (N, T) of each batch
    padding: tuple[tuple[int, ...], ...] | None  # how many positions of each example are pads; None: no mask
    modules: bool  # all layers but the first step's are left out
    seed: int
    curvature: str


class Model(nn.Module):
    def __init__(self, recipe: Recipe):
        super().__init__()
        kinds = {s.__name__: s for s in STEPS}
        steps: list[Step] = []
        for name in recipe.steps:
            steps.append(kinds[name](steps[-1].linear if steps else None))
        self.steps, self.head, self.pool = nn.ModuleList(steps), nn.Linear(WIDTH, recipe.classes), recipe.pool

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        state = State(x, mask.to(x.dtype))
        for step in self.steps:
            state = step(state)
        hidden, mask = state.x, state.mask
        if self.pool == "mean":
            pooled = hidden.mean(dim=1)
        elif self.pool == "masked mean":
            pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        elif self.pool == "masked maximum":
            pooled = hidden.masked_fill(mask[..., None] == 0, -9).amax(dim=1)
        elif self.pool == "last valid":
            pooled = hidden[torch.arange(len(hidden)), mask.sum(dim=1).long() - 1]
        elif self.pool == "first":
            pooled = hidden[:, 0]
        elif self.pool == "last":
            pooled = hidden[:, -1]
        elif self.pool == "maximum":
            pooled = hidden.amax(dim=1)
        else:
            pooled = hidden.sum(dim=1) / 3
        return self.head(pooled)


def draw_recipe(number: int) -> Recipe:
    """The recipe of a number; hypothesis chooses numbers, since choices of its own favour the simplest."""
    chance = random.Random(number)
    count = chance.randint(1, 3)
    if chance.random() < 1 / 3:  # keeps every assumption
        names = chance.choices(HARMLESS, k=count)
        pool = chance.choice(SAFE_POOLS)
    else:  # one that breaks something, somewhere among others
        names = chance.choices(HARMLESS, k=count - 1)
        names.insert(chance.randint(0, count - 1), chance.choice(STEPS))
        if chance.random() < 0.2:
            names.append(chance.choice(STEPS))
        pool = chance.choice(SAFE_POOLS if chance.random() < 0.6 else POOLS)
    shapes = []
    for _ in range(chance.randint(2, 3)):
        n = chance.randint(1, 4)
        shapes.append((n, n if chance.random() < 0.25 else chance.randint(1, 4)))
    padding = None
    if chance.random() < 0.5:
        padding = tuple(tuple(chance.randint(0, t - 1) for _ in range(n)) for n, t in shapes)
    return Recipe(
        steps=tuple(s.__name__ for s in names),
        pool=pool,
        classes=chance.choice((1, 2, 3, 3)),
        regression=chance.random() < 0.25,
        shapes=tuple(shapes),
        padding=padding,
        modules=chance.random() < 0.1,
        seed=chance.randint(0, 1000),
        curvature=chance.choice(("ekfac", "ekfac", "kfac", "exact")),
    )


RECIPES = st.integers(0, 2**32 - 1).map(draw_recipe)


def scene_of(recipe: Recipe) -> Scene:
    model = plain_module(lambda: Model(recipe))
    batches: list[dict[str, Tensor]] = []
    for b, (n, t) in enumerate(recipe.shapes):
        x = floats(n, t, WIDTH, seed=recipe.seed + b)
        batch = {"x": x}
        if recipe.padding is not None:
            lengths = torch.tensor([t - p for p in recipe.padding[b]])
            batch["attention_mask"] = (torch.arange(t) < lengths[:, None]).long()
        regression = recipe.regression or recipe.classes == 1
        batch["labels"] = floats(n, recipe.classes, seed=b) if regression else torch.arange(n) % recipe.classes
        batches.append(batch)
    arguments: dict[str, Any] = {}
    if recipe.regression or recipe.classes == 1:
        arguments["likelihood"] = "regression"
    if recipe.modules:
        arguments["modules"] = ["steps.0.linear"]
    scene = Scene(model, batches, single=padded_row, arguments=arguments, factors=False)
    with torch.no_grad():
        blind = recipe.padding is None or blind_to_padding(scene)
    if blind:  # then a token is one of the valid ones, and A and S are defined without the others
        scene.single = trimmed_row
    kinds = {s.__name__: s for s in STEPS}
    scene.factors = blind and all(kinds[name].called for name in recipe.steps)
    return scene


def trimmed_row(batch: Any, i: int) -> Any:
    row = padded_row(batch, i)
    if "attention_mask" not in row:
        return row
    valid = row["attention_mask"][0].bool()
    return {"x": row["x"][:, valid], "attention_mask": row["attention_mask"][:, valid]}


def blind_to_padding(scene: Scene) -> bool:
    """Whether every example has the same logits with its padding and without."""
    return all(
        relative(*(scene.run(scene.model, row(batch, i)) for row in (padded_row, trimmed_row))) < 1e-9
        for batch in scene.batches
        for i in range(len(batch["x"]))
    )


def interacting(scene: Scene) -> bool:
    """Whether an example's logits depend on who else is in its batch."""
    for batch in scene.batches:
        together = scene.run(scene.model, {k: v for k, v in batch.items() if k != "labels"})
        alone = torch.cat([scene.run(scene.model, scene.single(batch, i)) for i in range(len(batch["x"]))])
        if relative(together, alone) > 1e-9:
            return True
    return False


TALLY: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)


def outcome(recipe: Recipe) -> str:
    """right or refused; AssertionError for anything wrong."""
    scene = scene_of(recipe)
    with torch.no_grad():
        no_answer = interacting(scene)  # before the package has run
    found, refusal = attempt(lambda: ours(scene, recipe.curvature))
    if refusal is not None:
        assert str(refusal), "a refusal without a word"
        return "refused"
    assert not no_answer, "served, although examples interact"
    off = deviations(scene, found, recipe.curvature)
    wrong = {what: f"{error:.1e}" for what, error in off.items() if not error <= 1e-6}
    assert not wrong, f"silently wrong: {wrong}"
    return "right"


def keeps_every_assumption(recipe: Recipe) -> bool:
    kinds = {s.__name__: s for s in STEPS}
    return recipe.pool in SAFE_POOLS and all(kinds[name].harmless for name in recipe.steps)


def check(recipe: Recipe) -> None:
    kind = "plain" if keeps_every_assumption(recipe) else "other"
    hypothesis.note(str(recipe))
    try:
        result = outcome(recipe)
    except AssertionError:
        TALLY[kind]["wrong"] += 1
        for name in set(recipe.steps):
            TALLY[name]["wrong"] += 1
        raise
    hypothesis.event(f"{kind} models: {result}")
    TALLY[kind][result] += 1
    for name in set(recipe.steps):
        TALLY[name][result] += 1
    # A layer that no example of a batch of the loader ever needs is refused; everything else of this kind is served.
    assert kind != "plain" or result == "right", "refused what must be served"


def run_many(count: int) -> None:
    settings = hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate,),
        verbosity=hypothesis.Verbosity.normal,
    )
    TALLY.clear()
    try:
        hypothesis.given(RECIPES)(settings(check))()
    finally:
        for name in ("plain", "other", *(s.__name__ for s in STEPS)):
            print(f"{name:>18}: {dict(TALLY[name])}")


def test_random_models():
    run_many(ORDINARY)


@pytest.mark.parametrize("number", [28, 76, 766, 11319, 11709, 11866, 20106, 20449, 30555])
def test_recipes_that_were_once_wrong(number: int):
    assert outcome(draw_recipe(number)) in ("right", "refused")


@pytest.mark.slow
def test_many_random_models():
    run_many(MANY)


def single_step(name: str, **changes: Any) -> Recipe:
    chosen: dict[str, Any] = {
        "steps": (name,),
        "pool": "masked mean",
        "classes": 3,
        "regression": False,
        "shapes": ((3, 4), (3, 3), (2, 3)),
        "padding": None,
        "modules": False,
        "seed": 0,
        "curvature": "ekfac",
    }
    return Recipe(**{**chosen, **changes})


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", [s.__name__ for s in STEPS])
def test_every_step_by_itself(name: str, padding: bool):
    pads = ((0, 1, 2), (1, 0, 2), (0, 1)) if padding else None
    recipe = single_step(name, padding=pads)
    result = outcome(recipe)
    assert not keeps_every_assumption(recipe) or result == "right"


@pytest.mark.parametrize("pool", POOLS)
def test_every_pool(pool: str):
    assert outcome(single_step("Plain", pool=pool)) == "right"
    outcome(single_step("Plain", pool=pool, padding=((0, 1, 2), (1, 0, 2), (0, 1))))


def test_the_steps_are_what_they_say():
    """Those that interact do, the others do not."""
    for kind in STEPS:
        with torch.no_grad():
            assert interacting(scene_of(single_step(kind.__name__))) is kind.interacts, kind


def test_the_generator_draws_everything():
    seen: collections.Counter[str] = collections.Counter()

    @hypothesis.settings(max_examples=600, derandomize=True, database=None, deadline=None)
    @hypothesis.given(RECIPES)
    def draw(recipe: Recipe) -> None:
        seen["drawn"] += 1
        seen["plain"] += keeps_every_assumption(recipe)
        seen["padded"] += recipe.padding is not None
        seen["N = T"] += any(n == t and n > 1 for n, t in recipe.shapes)
        seen[recipe.curvature] += 1
        seen[recipe.pool] += 1
        seen.update(set(recipe.steps))

    draw()
    assert all(seen[s.__name__] >= 4 for s in STEPS), seen
    assert all(seen[pool] >= 10 for pool in POOLS), seen
    assert 0.2 < seen["plain"] / seen["drawn"] < 0.6, seen
    assert all(seen[what] > 60 for what in ("padded", "N = T", "ekfac", "kfac", "exact")), seen
