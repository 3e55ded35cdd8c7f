"""What fits and predictions launch outside the model's own passes: `python -m benchmarks.passes [--layers 32]`.

A Llama with LoRA on all seven linear maps of each layer, on the meta device: it has shapes and no numbers, so that
everything goes the way of a GPU, and whoever asks for a number is seen: there the host would wait. Counted is every
operation of PyTorch that is more than a view. Where Triton is installed, an operation of this package counts as what
its launcher launches; where it is not, as one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from torch import Tensor
from torch.fx.experimental import _config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.passes import Passes, fit_curvature
from bayesian_lora_kernels.model import pieces
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.findings import Checks
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.ops import device, dispatch
from bayesian_lora_kernels.posterior.curvature import CURVATURES, Curvature
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.prior import Prior
from bayesian_lora_kernels.predictive.logits import LogitPredictor

from . import launches

META = torch.device("meta")
EXAMPLES, TOKENS, CLASSES, RANK = 4, 96, 4, 8
BUDGET = 2**40  # bytes: everything in one piece
OURS = "bayesian_lora_kernels"
VIEWS = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
}
WELL = {"all": True, "any": False}  # what flags are taken to say
ALL = {torch.bool: False, torch.int64: 2**40}  # copied to the host: flags of what is wrong, and counts of what is kept
KINDS: dict[str, dict[str, Any]] = {
    "K-FAC": {"curvature": "kfac", "fisher": "mc"},
    "K-FAC of rank 8": {"curvature": "kfac", "fisher": "mc", "rank": 8, "rank_threshold": 48},
    "EKFAC": {"curvature": "ekfac", "fisher": "mc"},
    "exact": {"curvature": "exact", "fisher": "exact"},
}
CHOOSE = dispatch.choose
TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Seen:
    """What one stretch of a run asked of the device: operations, and how often the host waited for a number."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def __sub__(self, other: Seen) -> Seen:
        return Seen(self.launches - other.launches, self.waits - other.waits)


class Recorder(TorchDispatchMode):
    """Fills in `seen`; of what runs inside `pause`, only what the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.paused = Seen(), False
        self._flags: dict[int, str] = {}  # which operation a tensor is the result of

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function._opname
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.device == META for x in tensors):
            if name == "_local_scalar_dense":
                self.seen.waits["a number"] += 1
                return WELL.get(self._flags.get(id(args[0]), ""), 1)
            if name == "index" and any(x.dtype == torch.bool for x in tensors[1:]):
                self.seen.waits["an index by flags"] += 1
            target = kwargs.get("device") if name == "_to_copy" else None
            if target is not None and torch.device(target).type == "cpu":
                self.seen.waits["a copy"] += 1
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, ALL.get(dtype, 1), dtype=dtype)
            if function.namespace == OURS and TRITON and (body := _triton(name)) is not None:
                with self, _counted_kernels(self):
                    return body(*args, **kwargs)
        result = function(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if name in ("_to_copy", "copy_") and tensors[-1].device != made[0].device and not _does_not_block(args, kwargs):
            self.seen.waits["a copy from the host"] += 1
        if any(x.device == META for x in [*tensors, *made]) and not function.is_view and name not in VIEWS:
            self._count(self.seen.launches, name)
        for x in made:
            self._flags[id(x)] = name
        return result

    def _count(self, counter: Counter[str], name: str) -> None:
        counter[name] += not self.paused

    @contextlib.contextmanager
    def pause(self, paused: bool = True) -> Iterator[None]:
        """Counts nothing inside; or with False, counts again."""
        before, self.paused = self.paused, paused
        try:
            yield
        finally:
            self.paused = before


def _does_not_block(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))


def _triton(name: str) -> Callable[..., Any] | None:
    """The body of one of this package's operations, if it has a Triton kernel."""
    for module in launches.modules():
        body = getattr(vars(module).get(f"_{name}"), "_init_fn", None)
        if body is not None and "triton" in dispatch._registry.get(name.removesuffix("_accumulate"), {}):
            return body
    return None


class _Kernel:
    """Stands in for a kernel."""

    def __init__(self, name: str, recorder: Recorder):
        self.name, self.recorder = name, recorder

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: self.recorder._count(self.recorder.seen.launches, self.name)


@contextlib.contextmanager
def _counted_kernels(recorder: Recorder) -> Iterator[None]:
    """Operations go to their launchers, which launch nothing; they find the GPU of `benchmarks.launches`."""
    instead = ((device.architecture, lambda _: "sm_90"), (device.multiprocessors, lambda _: launches.MULTIPROCESSORS))
    with contextlib.ExitStack() as stack:
        for module in launches.modules():
            for name, value in list(vars(module).items()):
                if launches.is_kernel(name, value):
                    stack.enter_context(mock.patch.object(module, name, _Kernel(name, recorder)))
                elif value is CHOOSE:
                    stack.enter_context(mock.patch.object(module, name, _launcher))
                for asked, answer in instead:
                    if value is asked:
                        stack.enter_context(mock.patch.object(module, name, answer))
        yield


def _launcher(operation: str, impl: str, *arguments: Any) -> Callable[..., None]:
    wide = any(x.dtype == torch.float64 for x in tree_leaves(arguments[:2][-1]))
    return dispatch._registry[operation]["reference" if wide else "triton"].load()


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder that leaves out the model's own forward and backward passes."""
    recorder = Recorder()
    forward, backward = Forward.__call__, Capture.raw_backward

    def quiet_forward(self: Forward, *args: Any, **kwargs: Any) -> Any:
        with recorder.pause():
            return forward(self, *args, **kwargs)

    def quiet_backward(self: Capture, cotangent: Tensor, receive: Any, *args: Any) -> Any:
        def heard(*what: Any) -> None:
            with recorder.pause(False):
                receive(*what)

        with recorder.pause():
            return backward(self, cotangent, heard, *args)

    with (
        mock.patch.object(Forward, "__call__", quiet_forward),
        mock.patch.object(Capture, "raw_backward", quiet_backward),
        mock.patch.object(Checks, "due", return_value=""),  # what happens to most batches
        mock.patch.object(pieces, "_is_new", return_value=False),
        mock.patch.object(_config, "meta_nonzero_assume_all_nonzero", True),
        mock.patch.object(torch, "Generator", return_value=_NoGenerator()),
        mock.patch.object(Passes, "device", META),  # of a model that is all on it, as no other is
        mock.patch.object(Passes, "_drawn", return_value=None),
        recorder,
    ):
        yield recorder


class _NoGenerator:
    """There is none of the meta device."""

    def manual_seed(self, seed: int) -> None:
        return None


def llama(layers: int) -> torch.nn.Module:
    """With 7 adapted maps, 14 matrices, in each layer."""
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    adapter = peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config).bfloat16(), adapter)


def batch(padded: bool) -> dict[str, Tensor]:
    """As it comes from a loader: on the host."""
    mask = torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
    mask[0, 5:] = 1 - int(padded)
    ids = torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(EXAMPLES, dtype=torch.long)}


def passes(layers: int, padded: bool = True, kinds: Collection[str] = tuple(KINDS)) -> dict[str, Seen]:
    """`{stretch of a run: what it asked of the device}`."""
    model, ids = llama(layers), list(range(CLASSES))
    found = blk.LaplaceLoRA(model, class_token_ids=ids).layers
    model.to(META)
    loader = [batch(padded)] * 2

    def fitted(batches: int, **settings: Any) -> tuple[Curvature, Seen]:
        config = LaplaceConfig(memory_budget=BUDGET, **settings)
        forward = Forward(model, None, ids, CURVATURES[config.curvature].masked)
        with recording() as recorder:
            return fit_curvature(Passes(model, found, forward, loader[:batches], config)).curvature, recorder.seen

    def predicted(posterior: Posterior) -> Seen:
        whole = posterior.curvature.whole_jacobians
        predictor = LogitPredictor(model, found, Forward(model, None, ids), whole, BUDGET)
        with recording() as recorder:
            predictor.predict(Batch.of(loader[0], META, labels=False), None, [posterior])
        return recorder.seen

    result: dict[str, Seen] = {}
    for name in kinds:
        settings = KINDS[name]
        curvature, once = fitted(1, **settings)
        each = fitted(2, **settings)[1] - once
        result[f"{name}, each batch"], result[f"{name}, once"] = each, once - each
        posterior = Posterior(curvature, Prior(torch.ones((), dtype=torch.float64)))
        first, again = predicted(posterior), predicted(posterior)
        result[f"{name}, prediction"], result[f"{name}, a new prior"] = again, first - again
    return result


def table(found: Mapping[str, Seen]) -> str:
    """In Markdown, with the operations that there are most of."""
    lines = ["| stretch | launches | waits | most of them |", "|---|---|---|---|"]
    for name, seen in found.items():
        most = ", ".join(f"{count} {kind}" for kind, count in seen.launches.most_common(4))
        lines.append(f"| {name} | {seen.launches.total()} | {seen.waits.total()} | {most} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--unpadded", action="store_true")
    arguments = parser.parse_args()
    print(table(passes(arguments.layers, not arguments.unpadded)))


if __name__ == "__main__":
    main()
