"""The end_to_end section: fit and predict of Llamas with random weights, against plain passes and bayesian_lora."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA, set_default_impl
from benchmarks.cases.case import absent_here
from benchmarks.workload import (
    Workload,
    plain_pass,
    published_factors,
    published_fit,
    published_prediction,
    relative_error,
)

from .report import Report, each
from .timing import peak_bytes, synchronise

LLAMA_7B = Workload(layers=32, width=4096, heads=32, feed_forward=11008, vocabulary=32000, tokens=256)
LLAMA_1B = Workload(
    layers=16, width=2048, heads=32, key_value_heads=8, feed_forward=8192, vocabulary=128256, tokens=256
)
PLAIN = "plain"
IMPLS = ("triton", "reference")
# Of a predicted covariance under Triton against the reference: bf16 gradients differ, and random columns do not.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Plan:
    """How much is run: batches of the two fits whose difference is the cost of a batch, rounds, LaplaceLoRA's ranks."""

    short: int = 2
    long: int = 8
    rounds: int = 3
    rank: int = 32
    rank_threshold: int = 256

    def laplace(self, model: Any, ids: Tensor, **options: Any) -> LaplaceLoRA:
        settings = {"rank": self.rank, "rank_threshold": self.rank_threshold, "fisher": "mc"} | options
        return LaplaceLoRA(model, class_token_ids=ids, **settings)


DRY = Plan(short=1, long=2, rounds=1, rank=4, rank_threshold=16)


@dataclass(frozen=True)
class Setting:
    """One of fit, predict or bayesian_lora on one model."""

    what: str
    size: str
    adapter_dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        adapters = ", fp32 adapters" if self.adapter_dtype == torch.float32 else ""
        return f"{self.what} {self.size}{adapters}"


SETTINGS = [
    Setting("fit", "7B"),
    Setting("predict", "7B"),
    Setting("bayesian_lora", "7B"),
    Setting("fit", "1B"),
    Setting("predict", "1B"),
    Setting("bayesian_lora", "1B"),
    Setting("fit", "7B", torch.float32),
    Setting("predict", "7B", torch.float32),
]


class Models:
    """The model in use: one at a time, since a 7B takes 13 GB."""

    def __init__(self, device: torch.device, dry: bool):
        self.device, self.dry = device, dry
        self._key: tuple[str, torch.dtype] | None = None
        self._model: Any = None

    def workload(self, setting: Setting) -> Workload:
        workload = {"7B": LLAMA_7B, "1B": LLAMA_1B}[setting.size]
        if not self.dry:
            return workload
        small = replace(workload, layers=1, width=72, heads=4, feed_forward=32, vocabulary=40, examples=2, tokens=48)
        return replace(small, width=144, key_value_heads=2) if workload.key_value_heads else small

    def get(self, setting: Setting) -> Any:
        key = (setting.size, setting.adapter_dtype)
        if key != self._key:
            self._model = self._key = None
            free(self.device)
            # On a CPU everything in float32: half precision is slow there, and nothing is measured.
            dtype = torch.float32 if self.dry else torch.bfloat16
            adapters = torch.float32 if self.dry else setting.adapter_dtype
            self._model = self.workload(setting).model(self.device.type, dtype, adapters)
            self._key = key
        return self._model


def run(report: Report, device: torch.device, dry: bool, only: str) -> None:
    models = Models(device, dry)
    settings = {setting.name: setting for setting in SETTINGS if re.search(only, setting.name)}
    functions = {"fit": fit, "predict": predict, "bayesian_lora": peer}

    def one(name: str) -> None:
        if report.why_excluded(name, "*"):
            return
        setting = settings[name]
        workload = models.workload(setting)
        report.cases[name] = {"workload": str(workload), "adapters": str(setting.adapter_dtype)}
        with report.attempt(name, "timing"):
            functions[setting.what](report, name, models.get(setting), workload, device, DRY if dry else Plan())
        free(device)

    each(report, list(settings), one, reserve=40.0 if device.type == "cuda" else 1.0)


def fit(report: Report, name: str, model: Any, workload: Workload, device: torch.device, plan: Plan) -> None:
    """Cost of a batch, as the difference of a long and a short fit, against forward and backward of the same."""
    ids = workload.class_token_ids.to(device)
    batches = on(device, workload.batches(plan.long))
    laplaces = {impl: plan.laplace(model, ids) for impl in IMPLS}
    calls: dict[str, Callable[[int], object]] = {PLAIN: lambda count: plain_pass(model, batches[:count], ids)}
    for impl in IMPLS:
        calls[impl] = lambda count, impl=impl: laplaces[impl].fit(batches[:count], progress=False)
    covariances: dict[str, Tensor] = {}
    for impl in IMPLS:
        if absent := absent_here("outer_product", impl, device):
            del calls[impl]
            report.add(name, impl, "skipped", absent)
            continue
        with excused(report, name, impl, calls), using(impl):
            calls[impl](plan.short)
            covariances[impl] = predicted(laplaces[impl], batches[0], "reference")
    difference = differing(report, name, covariances, calls)
    short, long = (timed(calls, count, plan.rounds, device) for count in (plan.short, plan.long))
    per_batch = {impl: (long[impl] - short[impl]) / (plan.long - plan.short) for impl in calls}
    for impl in calls:
        with using(impl):
            memory = peak_bytes(lambda impl=impl: calls[impl](plan.short), device)
        values: dict[str, Any] = {
            "ms_per_batch": 1e3 * per_batch[impl],
            "ms_besides": 1e3 * (short[impl] - plan.short * per_batch[impl]),
            "peak_mib": mebibytes(memory),
        }
        if impl != PLAIN:
            ratio = per_batch[impl] / per_batch[PLAIN]
            values |= {"times_plain": ratio, "covariance_difference": difference, "targets": said(ratio, 1.10)}
        detail = "forward + backward of the LoRA parameters" if impl == PLAIN else ""
        report.add(name, impl, "measured", detail, **values)


def predict(report: Report, name: str, model: Any, workload: Workload, device: torch.device, plan: Plan) -> None:
    """One batch, C = 4, against one forward and C backwards; peak memory against a training step's."""
    ids = workload.class_token_ids.to(device)
    batches = on(device, workload.batches(plan.short))
    laplace = plan.laplace(model, ids)
    with using("reference"):
        laplace.fit(batches, progress=False)
    calls: dict[str, Callable[[int], object]] = {PLAIN: lambda _: forward_and_backwards(model, batches[0], ids)}
    covariances: dict[str, Tensor] = {}
    for impl in IMPLS:
        calls[impl] = lambda _: laplace.predict(batches[0])
        if absent := absent_here("jacobian_covariance", impl, device):
            del calls[impl]
            report.add(name, impl, "skipped", absent)
            continue
        with excused(report, name, impl, calls):
            covariances[impl] = predicted(laplace, batches[0], impl)
    difference = differing(report, name, covariances, calls)
    seconds = timed(calls, 1, plan.rounds, device)
    training = peak_bytes(lambda: plain_pass(model, batches[:1], ids), device)
    for impl in calls:
        with using(impl):
            memory = peak_bytes(lambda impl=impl: calls[impl](1), device)
        values: dict[str, Any] = {"ms_per_batch": 1e3 * seconds[impl], "peak_mib": mebibytes(memory)}
        if impl != PLAIN:
            ratio = seconds[impl] / seconds[PLAIN]
            values |= {"times_plain": ratio, "covariance_difference": difference, "targets": said(ratio, 1.10)}
            if memory is not None and training is not None:
                values["memory_of_training_step"] = memory / training
                values["targets"] += "; memory " + said(memory / training, 1.2)
        detail = f"forward + {workload.classes} backward" if impl == PLAIN else ""
        report.add(name, impl, "measured", detail, **values)


def peer(report: Report, name: str, model: Any, workload: Workload, device: torch.device, plan: Plan) -> None:
    """bayesian_lora's own fit (it sees the last token only) and prediction, a batch each, on the same model."""
    if importlib.util.find_spec("bayesian_lora") is None:
        report.add(name, "fit", "skipped", "bayesian_lora is not installed")
        report.add(name, "predict", "skipped", "bayesian_lora is not installed")
        return
    ids = workload.class_token_ids.to(device)
    batches = on(device, workload.batches(1))
    with report.attempt(name, "fit"):
        seconds, _ = clocked(lambda: published_fit(model, batches, workload.kept, ids), device)
        detail = "one batch, the pace of many is extrapolated from it; it sees the last token only"
        report.add(name, "fit", "measured", detail, ms_per_batch=1e3 * seconds)
    with report.attempt(name, "predict"):
        laplace = plan.laplace(model, ids, rank=workload.kept, tail=False)
        with using("reference"):
            laplace.fit(batches, progress=False)
        factors = published_factors(laplace, workload, device.type)
        memory = peak_bytes(lambda: published_prediction(model, batches[0], factors, workload, device.type), device)
        seconds, (_, covariance) = clocked(
            lambda: published_prediction(model, batches[0], factors, workload, device.type), device
        )
        error = relative_error(predicted(laplace, batches[0], "reference").to(covariance.dtype), covariance)
        values = {"ms_per_batch": 1e3 * seconds, "peak_mib": mebibytes(memory), "covariance_difference": error}
        report.add(name, "predict", "measured", "", **values)


def forward_and_backwards(model: Any, batch: Mapping[str, Tensor], ids: Tensor) -> None:
    """What a prediction cannot do without: the logits, and a gradient of each chosen one."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1, use_cache=False
    ).logits[:, -1, ids]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for c in range(len(ids)):
        torch.autograd.grad(logits[:, c].sum(), parameters, retain_graph=c + 1 < len(ids))


def predicted(laplace: LaplaceLoRA, batch: Mapping[str, Tensor], impl: str) -> Tensor:
    with using(impl):
        return laplace.predict(batch).covariance


def differing(
    report: Report, name: str, covariances: Mapping[str, Tensor], calls: dict[str, Callable[[int], object]]
) -> float | None:
    """Relative difference of Triton's covariance from the reference's; too large, and no speed is reported."""
    if len(covariances) < 2:
        return None
    difference = relative_error(covariances["triton"].double(), covariances["reference"].double())
    if not difference <= TOLERANCE:
        del calls["triton"]
        detail = f"covariances differ by {difference:.2e}, allowed {TOLERANCE:.0e}: no speed is reported"
        report.add(name, "triton", "red", detail, covariance_difference=difference)
    return difference


@contextlib.contextmanager
def excused(report: Report, name: str, impl: str, calls: dict[str, Callable[[int], object]]) -> Iterator[None]:
    """An implementation that fails is a row; the others are measured."""
    count = len(report.rows)
    with report.attempt(name, impl):
        yield
    if len(report.rows) > count:
        del calls[impl]


@contextlib.contextmanager
def using(impl: str) -> Iterator[None]:
    """The operations under an explicit implementation (`auto` leaves out what no GPU has run)."""
    set_default_impl(None if impl == PLAIN else impl)
    try:
        yield
    finally:
        set_default_impl(None)


def timed(
    calls: Mapping[str, Callable[[int], object]], count: int, rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds, the calls in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {impl: [] for impl in calls}
    for turn in range(rounds + 1):
        for impl, call in calls.items():
            with using(impl):
                elapsed, _ = clocked(lambda call=call: call(count), device)
            if turn:
                seconds[impl].append(elapsed)
    return {impl: statistics.median(values) for impl, values in seconds.items()}


def clocked(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    synchronise(device)
    start = time.perf_counter()
    result = call()
    synchronise(device)
    return time.perf_counter() - start, result


def on(device: torch.device, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def said(ratio: float, most: float) -> str:
    if ratio <= 0:
        return f"<= {most:.2f}: open, the differences are noise"
    return f"<= {most:.2f}: {'reached' if ratio <= most else 'missed'}"
