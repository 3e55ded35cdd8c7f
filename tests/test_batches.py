"""What a batch may be and how it is cut: served with the numbers of the plain batch, or refused with what to do."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import types
from typing import Any, NamedTuple, TypedDict

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, llama, mlp, randomise
from snapshot import untouched
from tokenizers import Tokenizer, models
from torch import Tensor

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.memory import tokens_of
from bayesian_lora_kernels.model.reading import inputs_and_labels, parsed


class Pair(NamedTuple):
    inputs: Any
    labels: Any


class Other(NamedTuple):  # the same by its places
    x: Any
    y: Any


class Columns(NamedTuple):
    labels: Any
    input_ids: Any
    attention_mask: Any


class Typed(TypedDict):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    input_ids: Any
    attention_mask: Any
    labels: Any = None


@dataclasses.dataclass
class Parts:
    inputs: Any
    label_ids: Any


class Mine(dict):
    def __init__(self, origin, items):
        super().__init__(items)
        self.origin = origin


@dataclasses.dataclass
class Output(transformers.modeling_outputs.ModelOutput):
    input_ids: Any = None
    attention_mask: Any = None
    labels: Any = None


def changed(**change):
    """The batch with other values under some keys."""
    return lambda b: {**b, **{key: value(b[key]) for key, value in change.items()}}


def every(convert):
    return lambda b: {key: convert(value) for key, value in b.items()}


def renamed(name, **also):
    return lambda b: {**{key: b[key] for key in ("input_ids", "attention_mask")}, name: b["labels"], **also}


def collated(batch):
    """What DataCollatorWithPadding makes of a tokenizer's output."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
    )
    examples = [
        {"input_ids": ids[mask.bool()].tolist(), "attention_mask": [1] * int(mask.sum()), "label": int(label)}
        for ids, mask, label in zip(*(batch[key] for key in ("input_ids", "attention_mask", "labels")), strict=True)
    ]
    return transformers.DataCollatorWithPadding(tokenizer)(examples)


INPUTS = ("input_ids", "attention_mask")
SERVED = {
    "lists": every(Tensor.tolist),
    "tuples": every(lambda value: tuple(map(tuple, value.tolist())) if value.ndim > 1 else tuple(value.tolist())),
    "lists of tensors": every(list),
    "lists of arrays": every(lambda value: [row.numpy() for row in value]),
    "NumPy": every(Tensor.numpy),
    "NumPy, int32": every(lambda value: value.numpy().astype(np.int32)),
    "NumPy, uint16": every(lambda value: value.numpy().astype(np.uint16)),
    "NumPy, objects": every(lambda value: np.array(value.tolist(), dtype=object)),
    "NumPy, read only and reversed": lambda b: {k: np.flip(np.flip(v.numpy()).copy()) for k, v in b.items()},
    "labels as a list": changed(labels=Tensor.tolist),
    "labels as int32": changed(labels=lambda y: y.numpy().astype(np.int32)),
    "labels as a list of NumPy numbers": changed(labels=lambda y: list(y.numpy())),
    "mask as bool": changed(attention_mask=Tensor.bool),
    "mask as floats": changed(attention_mask=Tensor.double),
    "mask as a list of bools": changed(attention_mask=lambda mask: mask.bool().tolist()),
    "column label": renamed("label"),
    "column label_ids": renamed("label_ids"),
    "column label as a list": lambda b: {**renamed("label")(b), "label": b["labels"].tolist()},
    "labels win over label": lambda b: {**b, "label": 1 - b["labels"]},
    "label where labels is None": renamed("label", labels=None),
    "texts beside": lambda b: {"text": ["a", "b", "c", "d"], **b, "meta": [{"id": i} for i in range(4)]},
    "ragged numbers beside": lambda b: {**b, "offsets": [[1], [1, 2], [3], []]},
    "BatchEncoding": transformers.BatchEncoding,
    "BatchEncoding of lists": lambda b: transformers.BatchEncoding(every(Tensor.tolist)(b)),
    "BatchFeature": transformers.BatchFeature,
    "ModelOutput": lambda b: Output(**b),
    "UserDict": collections.UserDict,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda b: collections.defaultdict(list, b),
    "a dict of one's own": lambda b: Mine("here", b),
    "MappingProxyType": types.MappingProxyType,
    "TypedDict": lambda b: Typed(**b),
    "a tuple": lambda b: ({key: b[key] for key in INPUTS}, b["labels"]),
    "a list": lambda b: [{key: b[key] for key in INPUTS}, b["labels"]],
    "a tuple of lists": lambda b: ({key: b[key].tolist() for key in INPUTS}, b["labels"].tolist()),
    "a tuple of BatchEncoding": lambda b: (transformers.BatchEncoding({key: b[key] for key in INPUTS}), b["labels"]),
    "a tuple of one, with labels inside": lambda b: (b,),
    "a tuple without labels, with labels inside": lambda b: (b, None),
    "a named tuple (inputs, labels)": lambda b: Pair({key: b[key] for key in INPUTS}, b["labels"]),
    "a named tuple (x, y)": lambda b: Other({key: b[key] for key in INPUTS}, b["labels"].tolist()),
    "a named tuple of columns": lambda b: Columns(**b),
    "a named tuple of lists": lambda b: Columns(**every(Tensor.tolist)(b)),
    "a frozen dataclass": lambda b: Frozen(**b),
    "a dataclass of arrays": lambda b: Frozen(**every(Tensor.numpy)(b)),
    "a dataclass (inputs, label_ids)": lambda b: Parts({key: b[key] for key in INPUTS}, b["labels"]),
    "DataCollatorWithPadding": collated,
}


@pytest.fixture(scope="module")
def plain():
    """A causal LM, its batch, and what the plain batch gives."""
    case = llama()
    laplace = blk.LaplaceLoRA(case.model, **case.arguments).fit([case.batch()], progress=False)
    return case, laplace, laplace.predict(case.batch())


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("name", SERVED)
def test_served(name, pieces, plain):
    case, expected, prediction = plain
    batch = SERVED[name](case.batch())
    budget = {"memory_budget": 1} if pieces else {}
    with untouched(case.model):
        laplace = blk.LaplaceLoRA(case.model, **case.arguments, **budget).fit([batch], progress=False)
    assert laplace.n_examples == 4
    torch.testing.assert_close(laplace.log_likelihood, expected.log_likelihood)
    found = laplace.predict(batch)
    torch.testing.assert_close(found.mean, prediction.mean)
    torch.testing.assert_close(found.covariance, prediction.covariance)
    empirical = blk.LaplaceLoRA(case.model, **case.arguments, fisher="empirical", **budget)  # which needs the labels
    assert empirical.fit([batch], progress=False).n_examples == 4


@pytest.mark.filterwarnings("ignore:the best prior precision")
@pytest.mark.parametrize("name", ["lists", "NumPy", "column label", "a frozen dataclass", "BatchEncoding of lists"])
def test_other_calls_serve_the_same_batches(name, plain):
    case, laplace, _ = plain
    batch = SERVED[name](case.batch())
    one, two = (laplace.predict(b, outputs="vocabulary").mean for b in (batch, case.batch()))
    torch.testing.assert_close(one, two)
    scores = [laplace.score(b, 4, torch.Generator().manual_seed(0)) for b in (batch, case.batch())]
    torch.testing.assert_close(scores[0].log_prob, scores[1].log_prob)
    tuned = blk.LaplaceLoRA(case.model, **case.arguments).fit([batch], progress=False)
    tuned.optimize_prior_precision("nll", val_loader=[batch])


@pytest.mark.parametrize("types_there", [False, True])
def test_token_type_ids(types_there):
    case = bert()
    batch = case.batch()
    expected = blk.LaplaceLoRA(case.model).fit([batch], progress=False)
    given = every(Tensor.tolist)(
        {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} if types_there else batch
    )
    found = blk.LaplaceLoRA(case.model).fit([given], progress=False)
    torch.testing.assert_close(found.predict(given).covariance, expected.predict(batch).covariance)


X, Y = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 1, 0])
TUPLES = {
    "NumPy": (X.numpy(), Y.numpy()),
    "NumPy inputs": (X.numpy(), Y),
    "labels as a list": (X, Y.tolist()),
    "a list of arrays": [X.numpy(), Y.numpy().astype(np.int16)],
    "positional inputs": ((X,), Y),
    "positional arrays": ([X.numpy()], Y),
    "a named tuple": Other(X.numpy(), Y),
    "a dataclass": Parts(X.numpy(), Y),
}


@pytest.mark.parametrize("name", TUPLES)
def test_tuples(name):
    model = mlp().model
    expected = blk.LaplaceLoRA(model).fit([(X, Y)], progress=False)
    found = blk.LaplaceLoRA(model).fit([TUPLES[name]], progress=False)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)
    torch.testing.assert_close(found.predict(TUPLES[name]).covariance, expected.predict((X, Y)).covariance)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([[1, 2], [3, 4]], torch.int64),
        ([[True, False]] * 2, torch.bool),
        ([[0.5], [1]], torch.float32),
        ([[True], [2]], torch.int64),
        (np.zeros((2, 1), np.float32), torch.float32),
        (np.zeros((2, 1), ">f8"), torch.float64),
        (np.zeros((2, 1), np.longdouble), torch.float64),
        (np.zeros((2, 1), bool), torch.bool),
        (np.zeros((2, 1), np.uint8), torch.int64),
    ],
)
def test_dtypes(value, dtype):
    found = Batch.of({"x": value}).given["x"]
    assert found.dtype == dtype
    assert found.tolist() == np.asarray(value).tolist()


@pytest.mark.parametrize(
    "value", ["ab", ["a", "b"], [["a"], ["b"]], [1, "b"], [[1], [2, 3]], [2**70, 1], None, 3, (3, 4), []]
)
def test_what_is_no_tensor_stays(value):
    assert Batch.of({"x": value, "input_ids": torch.ones(2, 3)}).given["x"] is value


def test_tensors_in_depth_move_and_the_batch_stays_as_it_was():
    with torch.inference_mode():
        frozen = torch.ones(2, 3)
    inner = ({"k": frozen}, "text")
    batch = {"input_ids": frozen, "past": inner}
    moved = Batch.of(batch, torch.device("cpu")).given
    assert not moved["input_ids"].is_inference()
    assert not moved["past"][0]["k"].is_inference()
    assert batch == {"input_ids": frozen, "past": inner}
    assert batch["input_ids"] is frozen


def test_a_batch_is_read_once(plain, monkeypatch):
    case, laplace, _ = plain
    seen = []
    monkeypatch.setattr("bayesian_lora_kernels.model.batches.parsed", lambda *args: seen.append(args) or parsed(*args))
    calls = {
        "fit": lambda: blk.LaplaceLoRA(case.model, **case.arguments).fit([case.batch()], progress=False),
        "predict": lambda: laplace.predict(case.batch()),
        "vocabulary": lambda: laplace.predict(case.batch(), outputs="vocabulary").top(2),
        "score": lambda: laplace.score(case.batch(), 2),
        "verify": lambda: laplace.verify(case.batch()),
    }
    for name, call in calls.items():
        seen.clear()
        call()
        assert len(seen) == 1, name
    once = Batch.of(case.batch())
    assert Batch.of(once) is once


# The type that a user's own forward gets.

KEPT = {name: SERVED[name] for name in SERVED if name not in ("lists", "NumPy")}


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("name", KEPT)
def test_a_forward_of_ones_own_gets_the_type_that_the_loader_gave(name, pieces, plain):
    case, expected, _ = plain
    batch, seen = KEPT[name](case.batch()), []

    def forward(model, given):
        seen.append(given)
        inputs = inputs_and_labels(given)[0]
        return model(**{key: inputs[key] for key in INPUTS}).logits[
            torch.arange(len(inputs["input_ids"])), inputs["attention_mask"].long().sum(dim=1) - 1
        ][:, [2, 5, 7]]

    budget = {"memory_budget": 1} if pieces else {}
    laplace = blk.LaplaceLoRA(case.model, forward=forward, check="off", **budget).fit([batch], progress=False)
    torch.testing.assert_close(laplace.log_likelihood, expected.log_likelihood)
    assert {type(one) for one in seen} == {type(batch)}
    assert len(seen) == (4 if pieces else 1)
    blk.LaplaceLoRA(case.model, forward=forward, **budget).fit([batch], progress=False)  # checks keep the type, too
    assert {type(one) for one in seen} == {type(batch)}
    assert getattr(seen[0], "origin", None) == getattr(batch, "origin", None)
    bare = Batch.of(batch, labels=False)
    assert type(bare.given) is type(batch)
    assert bare.labels is None
    assert inputs_and_labels(bare.given)[1] is None


def test_only_columns_of_a_model_are_converted_in_a_dataclass():
    batch = dataclasses.make_dataclass("Batch", ["input_ids", "lengths", "labels"])([[1, 2]], [2], [0])
    moved = Batch.of(batch, torch.device("cpu")).given
    assert moved.lengths is batch.lengths
    assert isinstance(moved.input_ids, Tensor)
    assert isinstance(moved.labels, Tensor)
    assert batch.input_ids == [[1, 2]]


# Refused.

CAUSAL = torch.full((4, 1, 6, 6), -torch.inf).triu(1)
REFUSED = {
    "ragged lists": (
        changed(input_ids=lambda v: [[1], [1, 2], [3], [4]]),
        ValueError,
        r"input_ids: .*1 to 2.*pad them",
    ),
    "ragged tensors": (
        changed(input_ids=lambda v: [v[0], v[1, :3], v[2], v[3]]),
        ValueError,
        r"input_ids: .*3 to 6.*pad",
    ),
    "ragged masks": (changed(attention_mask=lambda v: [[1]] * 3 + [[1, 1]]), ValueError, r"attention_mask: .*pad them"),
    "ragged labels": (
        changed(labels=lambda v: [[1], [1, 2], [3], [4]]),
        ValueError,
        r"labels: expected rows .*pad them",
    ),
    "ragged objects": (
        changed(input_ids=lambda v: np.array([[1], [1, 2], [3], [4]], dtype=object)),
        ValueError,
        r"input_ids: .*pad them",
    ),
    "labels of text": (
        changed(labels=lambda v: ["no"] * 4),
        TypeError,
        r"labels: expected numbers .* a list of str; map",
    ),
    "label of text": (renamed("label", label=["no"] * 4), TypeError, r"label: expected numbers .* a list of str"),
    "labels that are a mapping": (changed(labels=lambda v: {"y": v}), TypeError, r"labels: expected numbers .* a dict"),
    "labels of None": (
        changed(labels=lambda v: [None] * 4),
        TypeError,
        r"labels: expected numbers .* list of NoneType",
    ),
    "no batch dimension": (
        every(lambda v: v[0]),
        ValueError,
        r"input_ids: expected a batch dimension, \[N, T\], .*\[6\]",
    ),
    "no batch dimension, lists": (every(lambda v: v[0].tolist()), ValueError, r"input_ids: expected a batch dimension"),
    "one label": (
        changed(labels=lambda v: v[0]),
        ValueError,
        r"labels: expected a batch dimension, \[N\] .*shape \[\]",
    ),
    "one label, an int": (changed(labels=lambda v: 1), ValueError, r"labels: expected a batch dimension"),
    "one label in a tuple": (lambda b: (b, b["labels"][0]), ValueError, r"labels: expected a batch dimension"),
    "too few labels": (
        changed(labels=lambda v: v[:3]),
        ValueError,
        r"labels: .* 4 examples of input_ids \[4, 6\].*\[3\]",
    ),
    "too many labels": (
        lambda b: (b, [0] * 5),
        ValueError,
        r"labels: expected one for each of the 4 .*got shape \[5\]",
    ),
    # They could also be the labels of a text of one token, so nothing is guessed.
    "labels [N, 1]": (changed(labels=lambda v: v[:, None]), ValueError, r"labels: expected class indices \[N\]"),
    "examples": (
        lambda b: [{k: v[i] for k, v in b.items()} for i in range(2)],
        TypeError,
        r"a mapping .* list of 2 exam",
    ),
    "named examples": (lambda b: [Frozen(1, 1)] * 3, TypeError, r"a mapping .* a list of 3 examples; collate them"),
    "a tuple of three": (lambda b: tuple(b.values()), TypeError, r"expected a mapping .*got tuple of length 3"),
    "an empty tuple": (lambda b: (), TypeError, r"expected a mapping .*got tuple of length 0"),
    "an object": (lambda b: types.SimpleNamespace(**b), TypeError, r"expected a mapping .*got SimpleNamespace"),
    "None": (lambda b: None, TypeError, r"expected a mapping .*got NoneType"),
    "an additive mask": (
        changed(attention_mask=lambda v: (1 - v) * -1e4),
        ValueError,
        r"attention_mask: .*0 .*got -10000",
    ),
    "a mask of -inf": (
        changed(attention_mask=lambda v: v.double().log()),
        ValueError,
        r"attention_mask: .*got -inf .*\[4, 6\]",
    ),
    "a mask of NaN": (changed(attention_mask=lambda v: v * torch.nan), ValueError, r"attention_mask: .*got nan"),
    "a mask of segments": (
        changed(attention_mask=lambda v: v * 2),
        ValueError,
        r"attention_mask: .*got 2 .*forward=...",
    ),
    "a 4-D mask": (
        changed(attention_mask=lambda v: CAUSAL),
        ValueError,
        r"attention_mask: .*\[N, T\], got \[4, 1, 6, 6\]",
    ),
    "a 4-D mask, a list": (
        changed(attention_mask=lambda v: CAUSAL.tolist()),
        ValueError,
        r"attention_mask: .*\[4, 1, 6, 6\]",
    ),
    "a 3-D mask": (
        changed(attention_mask=lambda v: CAUSAL[:, 0]),
        ValueError,
        r"attention_mask: .*\[N, T\], got \[4, 6, 6\]",
    ),
    "a 1-D mask": (
        changed(attention_mask=lambda v: v[0]),
        ValueError,
        r"attention_mask: expected shape \[N, T\], got \[6\]",
    ),
    "a mask by kind": (
        changed(attention_mask=lambda v: {"full": v}),
        ValueError,
        r"attention_mask: expected a tensor .*dict",
    ),
    "a mask of text": (
        changed(attention_mask=lambda v: ["1"] * 4),
        ValueError,
        r"attention_mask: expected a tensor .*list",
    ),
    "a decoder's 4-D mask": (
        lambda b: {**b, "decoder_attention_mask": CAUSAL},
        ValueError,
        r"decoder_attention_mask: .*\[4, 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, plain):
    case, laplace, prediction = plain
    change, error, message = REFUSED[name]
    batch = change(case.batch())
    fresh = blk.LaplaceLoRA(case.model, **case.arguments)
    with untouched(case.model), pytest.raises(error, match=r"batch 1: (batch: )?.*" + message):
        fresh.fit([case.batch(), batch], progress=False)
    assert torch.equal(laplace.predict(case.batch()).covariance, prediction.covariance)


LOADERS = {
    "a dict": lambda b: b,
    "a BatchEncoding": transformers.BatchEncoding,
    "a UserDict": collections.UserDict,
    "a dataclass": lambda b: Frozen(**b),
    "a tensor": lambda b: b["input_ids"],
    "an array": lambda b: b["input_ids"].numpy(),
}


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("name", LOADERS)
def test_a_batch_instead_of_a_loader(name, curvature):
    case = llama()
    laplace = blk.LaplaceLoRA(case.model, curvature=curvature, **case.arguments)
    message = (
        r"loader: expected an iterable of batches such as a DataLoader or a list of batches, got one .*pass \[batch\]"
    )
    with untouched(case.model), pytest.raises(TypeError, match=message):
        laplace.fit(LOADERS[name](case.batch()), progress=False)


def test_no_loader_at_all():
    with pytest.raises(TypeError, match=r"loader: expected an iterable of batches .* got NoneType"):
        blk.LaplaceLoRA(mlp().model).fit(None, progress=False)


class ByIndex:
    """Iterable by the old protocol."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, index):
        return self.batches[index]


@dataclasses.dataclass
class Loader:
    batches: list[Any]

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("loader", [iter, tuple, Loader, collections.deque, ByIndex, lambda b: (one for one in b)])
def test_loaders(loader, plain):
    case, expected, _ = plain
    empty = {key: value[:0] for key, value in case.batch().items()}
    for batches in (
        [case.batch()],
        [case.batch(), empty],
        [empty, case.batch()],
        [case.batch(), every(Tensor.tolist)(empty)],
    ):
        found = blk.LaplaceLoRA(case.model, **case.arguments).fit(loader(batches), progress=False)
        assert found.n_examples == 4
        torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)


# Masks.


def test_masks_of_multiple_choice():
    ids = torch.ones(3, 2, 4).long()
    Batch.of({"input_ids": ids, "attention_mask": ids, "labels": [0, 1, 0]})
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[N, T\], got \[3, 2, 5\]"):
        Batch.of({"input_ids": ids, "attention_mask": torch.ones(3, 2, 5)})


# Sizes.

IDS = torch.ones(3, 5).long()
SIZES = {
    "labels first": ({"x": torch.ones(7), "labels": torch.ones(3)}, 3),
    "label": ({"x": torch.ones(7), "label": [1, 2]}, 2),
    "ids before what comes first": ({"cache_position": torch.arange(5), "input_ids": IDS}, 3),
    "pixels first": ({"pixel_values": torch.ones(12, 2), "image_grid_thw": torch.ones(1, 3), "input_ids": IDS}, 3),
    "positions first": ({"position_ids": torch.ones(3, 2, 5), "inputs_embeds": torch.ones(2, 5, 4)}, 2),
    "audio": ({"input_features": torch.ones(2, 80, 30)}, 2),
    "images alone": ({"pixel_values": torch.ones(2, 3, 8, 8)}, 2),
    "packed and unknown": ({"image_grid_thw": torch.ones(4, 3), "x": torch.ones(2, 5)}, 2),
    "first tensor": ({"scale": torch.tensor(1.0), "x": torch.ones(2, 5), "y": torch.ones(4)}, 2),
    "lists": ({"input_ids": [[1], [2], [3]]}, 3),
    "texts": ({"text": ["a", "b"]}, 2),
    "tensors before texts": ({"names": ["a"], "x": torch.ones(2, 5)}, 2),
    "nested": ({"inputs": {"input_ids": IDS}}, 3),
    "nothing": ({"scale": torch.tensor(1.0), "n": 4}, None),
    "empty": ({}, None),
    "a tensor": (IDS, 3),
    "an array": (np.ones((2, 3)), 2),
    "a number": (torch.tensor(1.0), None),
    "a tuple": ((IDS, torch.ones(3)), 3),
    "a tuple of texts": ((["a", "b"], None), 2),
    "a tuple of a mapping": (({"x": torch.ones(9), "input_ids": IDS}, None), 3),
    "a graph": (((torch.ones(4, 2), torch.ones(2, 9)), torch.ones(4)), 4),
    "positional": ((torch.ones(4, 2), torch.ones(2, 9)), 4),
    "a dataclass": (Frozen(IDS, IDS), 3),
    "a named tuple": (Pair({"x": torch.ones(9)}, torch.ones(3)), 3),
    "an object": ((object(), None), None),
}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_examples(name):
    batch, expected = SIZES[name]
    found = Batch.unchecked(batch)
    assert found.size == (1 if expected is None else expected)
    assert found.rows_of_inputs is None or expected is not None
    if isinstance(batch, dict) and name != "first tensor":
        assert Batch.unchecked(dict(reversed(batch.items()))).size == found.size


# Cuts.

N = 4
CUT = {
    "a tensor": ("x", torch.arange(8).view(4, 2), 0),
    "a number": ("x", torch.tensor(1.0), None),
    "what all share": ("x", torch.ones(1, 5), None),
    "cache_position": ("cache_position", torch.arange(4), None),
    "positions": ("position_ids", torch.arange(20).view(4, 5), 0),
    "one row of positions": ("position_ids", torch.arange(5).view(1, 5), None),
    "multimodal positions": ("position_ids", torch.arange(60).view(3, 4, 5), 1),
    "multimodal positions and text": ("position_ids", torch.arange(80).view(4, 4, 5), 1),
    "texts": ("x", ["a", "b", "c", "d"], 0),
    "a tuple of texts": ("x", ("a", "b", "c", "d"), 0),
    "another number of texts": ("x", ["a", "b"], None),
    "images of any size": ("x", [torch.ones(3, i, 2) for i in range(4)], 0),
    "an array": ("x", np.arange(8).reshape(4, 2), 0),
}


@pytest.mark.parametrize("name", CUT)
def test_cuts(name):
    key, value, axis = CUT[name]
    ids = torch.arange(4)[:, None].expand(4, 5)
    piece = Batch.unchecked({"input_ids": ids, key: value}).rows(1, 3).given
    assert torch.equal(piece["input_ids"], ids[1:3])
    if axis is None:
        assert piece[key] is value or piece[key] == value
        return
    expected = value[:, 1:3] if axis == 1 else value[1:3]
    assert type(piece[key]) is type(value)
    assert len(piece[key]) == len(expected)
    assert all(np.array_equal(one, two) for one, two in zip(piece[key], expected, strict=True))


def test_cuts_of_multiple_choice_positions():
    ids = torch.arange(24).view(4, 3, 2)
    assert torch.equal(Batch.of({"input_ids": ids, "position_ids": ids}).rows(1, 3).given["position_ids"], ids[1:3])


def test_cuts_of_what_is_nested():
    cache = tuple((torch.ones(4, 2, i), torch.ones(4, 2, i)) for i in range(4))  # four layers
    batch = {"input_ids": torch.ones(4, 2), "past_key_values": cache, "more": {"x": torch.arange(4)}}
    piece = Batch.of(batch).rows(1, 3).given
    assert [k.shape[0] for k, _ in piece["past_key_values"]] == [2] * 4
    assert piece["more"]["x"].tolist() == [1, 2]


def test_cuts_of_positional_inputs():
    x, table = torch.arange(8).view(4, 2), torch.ones(7)
    inputs, labels = Batch.of(((x, table), torch.arange(4))).rows(1, 3).given
    assert torch.equal(inputs[0], x[1:3])
    assert inputs[1] is table
    assert labels.tolist() == [1, 2]
    texts, _ = Batch.of((["a", "b", "c", "d"], None)).rows(1, 3).given
    assert texts == ["b", "c"]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"input_ids": torch.ones(4, 5), "cu_seqlens": torch.arange(5), "scale": torch.tensor(1.0)}, ["cu_seqlens"]),
        ({"input_ids": torch.ones(4, 5), "pixel_values": torch.ones(7, 3, 2, 2), "names": ["a"]}, ["pixel_values"]),
        ({"cache_position": torch.arange(5), "position_ids": torch.ones(3, 4, 5), "bias": torch.ones(1, 5)}, []),
        ({"position_ids": torch.ones(3, 1, 5)}, []),
        ({"position_ids": torch.ones(3, 2, 5)}, ["position_ids"]),
        ({"pixel_values": torch.ones(16, 2), "image_grid_thw": torch.tensor([[1, 4, 4]])}, []),
        ((torch.ones(4, 2), torch.ones(4)), []),
        ((torch.ones(5, 2), torch.ones(4)), ["inputs"]),
        (((torch.ones(4, 2), torch.ones(2, 9)), torch.ones(4)), ["inputs[1]"]),
        (({"table": torch.ones(2, 9)}, torch.ones(4)), ["table"]),
        (Frozen(torch.ones(4, 5), torch.ones(3, 5)), ["attention_mask"]),
        (torch.ones(3), ["inputs"]),
        (torch.ones(4), []),
    ],
)
def test_what_is_not_cut_is_known(batch, expected):
    assert Batch.unchecked(batch, 4).uncut == expected


# Packed images and videos: examples with any number of them, each of its own size.

MEDIA = {1: ("pixel_values", "image_grid_thw"), 2: ("pixel_values_videos", "video_grid_thw")}


def packed(media, merge=2, width=3):
    """A batch of `media[i]`, a list of (kind, t, h, w) in units of merged patches, for each example."""
    rows = [[kind for kind, t, h, w in one for _ in range(t * h * w)] for one in media]
    length = max(map(len, rows)) + 1
    token_types = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    batch = {
        "input_ids": torch.arange(len(media))[:, None] * 100 + torch.arange(length),
        "mm_token_type_ids": token_types,
    }
    for kind, (pixels, grid) in MEDIA.items():
        sizes = [(i, t, merge * h, merge * w) for i, one in enumerate(media) for k, t, h, w in one if k == kind]
        if sizes:
            batch[grid] = torch.tensor([size[1:] for size in sizes])
            owner = [i for i, t, h, w in sizes for _ in range(t * h * w)]
            batch[pixels] = torch.tensor(owner, dtype=torch.float32)[:, None].expand(-1, width)
    if any(k == 2 for one in media for k, *_ in one):
        batch["second_per_grid_ts"] = torch.arange(sum(k == 2 for one in media for k, *_ in one)).float()
    return batch


def joined(pieces):
    keys = dict.fromkeys(key for piece in pieces for key in piece)
    parts = {key: [piece[key] for piece in pieces if piece[key] is not None] for key in keys}
    return {key: torch.cat(values) for key, values in parts.items() if values}


def same(one, two):
    assert {key for key in one if one[key] is not None} == {key for key in two if two[key] is not None}
    for key, value in one.items():
        assert value is None or torch.equal(value, two[key]), key


MEDIUM = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(MEDIUM, max_size=3), min_size=1, max_size=5), st.integers(1, 3), st.data())
def test_packed_images_are_cut_by_owner(media, merge, data):
    columns, n = packed(media, merge), len(media)
    batch = Batch.of(columns)
    before = {key: value.clone() for key, value in columns.items()}
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})
    pieces = [batch.rows(start, stop).given for start, stop in itertools.pairwise(cuts)]
    same(joined(pieces), columns)
    same(columns, before)
    assert batch.uncut == []
    for i in range(n):
        piece = batch.rows(i, i + 1).given
        for kind, (pixels, grid) in MEDIA.items():
            count = sum(k == kind for k, *_ in media[i])
            found = piece.get(grid)
            assert (0 if found is None else len(found)) == count
            assert count == 0 or (piece[pixels] == i).all()
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    size = stop - start
    inner = sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    once = batch.rows(start, stop)
    assert once.size == size
    if size:
        same(once.rows(*inner).given, batch.rows(start + inner[0], start + inner[1]).given)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.sampled_from([dict, Frozen, Pair, tuple, collections.UserDict]), st.data())
def test_pieces_make_the_whole(n, kind, data):
    ids, labels = torch.arange(5 * n).view(n, 5), torch.arange(n)
    batch: Any = {"input_ids": ids, "attention_mask": ids + 1, "labels": labels}
    if kind is Frozen:
        batch = Frozen(**batch)
    elif kind in (Pair, tuple):
        batch = Pair({"input_ids": ids, "attention_mask": ids + 1}, labels)
        batch = batch if kind is Pair else tuple(batch)
    else:
        batch = kind(batch)
    step = data.draw(st.integers(1, n))
    whole = Batch.unchecked(batch)
    rows, pieces = zip(*whole.pieces(step), strict=True)
    assert [torch.arange(n)[one].tolist() for one in rows] == [one.tolist() for one in torch.arange(n).split(step)]
    assert {type(piece.given) for piece in pieces} == {kind}
    assert torch.equal(torch.cat([piece.inputs["input_ids"] for piece in pieces]), ids)
    assert torch.equal(torch.cat([piece.inputs["attention_mask"] for piece in pieces]), ids + 1)
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), labels)
    assert [piece.size for piece in pieces] == [min(step, n - start) for start in range(0, n, step)]
    assert [Batch.unchecked(piece.given).size for piece in pieces] == [piece.size for piece in pieces]
    assert (pieces[0] is whole) == (step >= n)
    start = data.draw(st.integers(0, n))
    later = [piece.labels for _, piece in whole.pieces(step, start)]
    assert torch.equal(torch.cat([labels[:0], *later]), labels[start:])
    first = pieces[0].inputs["input_ids"]
    assert first.data_ptr() == ids.data_ptr()  # a view


TWO = [[(1, 1, 1, 1), (1, 1, 2, 1)], [(1, 1, 1, 3)]]
UNCLEAR = {
    "images without token types": (
        lambda b: b.pop("mm_token_type_ids"),
        r"image_grid_thw: 3 images of 2 .*mm_token_type_ids",
    ),
    "too few patches": (
        lambda b: b.update(pixel_values=b["pixel_values"][:-1]),
        r"pixel_values: expected the 24 .*got 23",
    ),
    "no tokens": (lambda b: b["mm_token_type_ids"].zero_(), r"image_grid_thw: 3 images of 24 patches .*the 0 tokens"),
    "a token too few": (lambda b: b["mm_token_type_ids"][0].sub_(1).clamp_(min=0), r"image_grid_thw: .*\[0, 3\]"),
    "an image across two": (
        lambda b: b["mm_token_type_ids"].copy_(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])),
        r"image_grid_thw: .*the 6 tokens of type 1 .*\[2, 4\]",
    ),
    "token types of others": (
        lambda b: b.update(mm_token_type_ids=b["mm_token_type_ids"][:1]),
        r"mm_token_type_ids: .*\[2, T\]",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_packed_images_of_nobody(name):
    change, message = UNCLEAR[name]
    batch = packed(TWO)
    change(batch)
    with pytest.raises(ValueError, match=message):
        Batch.of(batch).rows(0, 1)


def test_one_image_each_needs_no_token_types():
    batch = packed([[(1, 1, 1, 2)], [(1, 1, 1, 3)]])
    expected = Batch.of(batch).rows(1, 2).given
    for one in (batch, expected):
        del one["mm_token_type_ids"]
    same(Batch.of(batch).rows(1, 2).given, expected)


def vision_model():
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 60,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 2,
            "temporal_patch_size": 1,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", task_type="CAUSAL_LM")
    return randomise(peft.get_peft_model(transformers.Qwen2VLForConditionalGeneration(config), lora)).double()


def test_a_vision_language_model_one_example_at_a_time():
    """Examples with two images, none, a video and an image, and one image, of different sizes."""
    model = vision_model()
    media = [[(1, 1, 1, 1), (1, 1, 2, 2)], [], [(2, 2, 1, 1), (1, 1, 1, 2)], [(1, 1, 3, 1)]]
    batch = packed(media, width=12)
    types_of = batch["mm_token_type_ids"] = torch.zeros(4, 12).long()
    ids = batch["input_ids"] = torch.randint(10, 60, (4, 12))
    for i, one in enumerate(media):
        place = 0
        for kind, t, h, w in one:  # text between them, as templates put it
            types_of[i, place + 1 : place + 1 + t * h * w], place = kind, place + 1 + t * h * w
    ids[types_of == 1], ids[types_of == 2] = 5, 6
    del batch["second_per_grid_ts"]
    for key in ("pixel_values", "pixel_values_videos"):
        batch[key] = torch.randn(batch[key].shape, dtype=torch.float64)
    batch |= {"attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 1])}
    whole = blk.LaplaceLoRA(model, class_token_ids=[11, 12, 13], memory_budget=2**30).fit([batch], progress=False)
    pieces = blk.LaplaceLoRA(model, class_token_ids=[11, 12, 13], memory_budget=1).fit(
        [dict(reversed(batch.items()))], progress=False
    )
    torch.testing.assert_close(pieces.log_likelihood, whole.log_likelihood)
    one, two = pieces.predict(batch), whole.predict(batch)
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.covariance, two.covariance)


def test_tokens_of_a_batch():
    ids = torch.ones(2, 6).long()
    grid = torch.tensor([[1, 4, 4]] * 3)
    assert tokens_of(Batch.of({"input_ids": ids, "labels": ids[:, :1].expand(2, 50)})) == 6
    assert tokens_of(Batch.of({"input_ids": ids, "pixel_values": torch.ones(48, 12), "image_grid_thw": grid})) == 24
    assert tokens_of(Batch.of({"input_ids": ids, "position_ids": torch.ones(3, 2, 6).long()})) == 6
    assert tokens_of(Batch.of({"input_ids": torch.ones(2, 4, 6).long()})) == 24
    assert tokens_of(Batch.of({"input_features": torch.ones(2, 80, 300)})) == 300
    assert tokens_of(Batch.of({"pixel_values": torch.ones(2, 3, 28, 28)})) == 4
    assert tokens_of(Batch.of((torch.ones(2, 7, 4), None))) == 7
    assert tokens_of(Batch.of((torch.ones(2, 4), None))) == 1
