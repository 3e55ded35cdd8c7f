"""Whether ``auto`` may take an implementation for a call: asked by ``dispatch``, answered from memory where it can be.

A unit is an operation, an implementation and a variant, which is everything that selects what is compiled. The first
call that takes a unit has it judged in a process of its own, then compares the unit with the reference on a sample of
the real call, and where both are right measures which is faster. All three are remembered.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import machine
from .judge import Verdict
from .machine import Runtime
from .problem import Arguments, Function, Suite, error, mapped, tensors_in
from .process import Worker
from .store import Store
from .worker import attribute

logger = logging.getLogger("bayesian_lora_kernels")

VARIABLE = "BLK_VERIFY"
MODES = ("auto", "0", "trust")
# A worker holds a context of some hundred MB on the GPU: end it when nobody asks any more.
IDLE_SECONDS = 30.0
# The reference takes over where it is faster by this factor.
FASTER = 1.1
_REPEATS, _SECONDS = 4, 2.0  # most calls that are timed, and how long they may take together
_TIMED_BYTES = 1 << 28  # of outputs that are copied to measure times
_SLOWER_THAN_REFERENCE = "the reference was measured to be faster for calls of this size"


def mode() -> str:
    """``BLK_VERIFY``, read at every call: ``auto``; ``0``: only what an earlier process verified; ``trust``: no checks.

    Raises ValueError for another value.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in MODES:
        raise ValueError(f"environment variable {VARIABLE}: expected one of {MODES}, got {value!r}")
    return value


@dataclass(frozen=True)
class Evidence:
    """Where to find what an implementation is verified by.

    Args:
        suite: import path of its ``Suite``, as ``worker.attribute`` reads it.
        variants: import path of the function of its arguments that says which variants a call takes.
    """

    suite: str
    variants: str


@dataclass(frozen=True)
class Claim:
    """That an implementation computes an operation: import paths of it and of its reference, and the evidence.

    ``operation`` is the function's name, so that operations with one function have one verdict.
    """

    operation: str
    name: str
    function: str
    reference: str
    evidence: Evidence

    def unit(self, variant: str) -> str:
        """What a variant of it is called."""
        return f"{self.operation} {self.name} {variant}".strip()


class Verifier:
    """Answers for one kind of machine."""

    def __init__(self, store: Store, ask: Callable[[dict[str, str]], Verdict]) -> None:
        self.store = store
        self._ask = ask
        self._settled: dict[Hashable, str] = {}  # what was answered before
        self._lock = threading.RLock()

    def refuses(self, claim: Claim, arguments: Arguments) -> str | None:
        """Why ``auto`` does not take the candidate for this call, or None. Changes none of the arguments."""
        trusted = mode()
        if trusted == "trust":
            return None
        variants: Sequence[Any] = attribute_once(claim.evidence.variants)(*arguments)
        device = next(tensors_in(arguments)).device
        size = _bucket(arguments)
        key = (claim, tuple(variants), device, size)
        if key not in self._settled:
            with self._lock:
                reason = self._settle(claim, list(map(str, variants)), arguments, device, size, trusted)
                if reason is None:
                    return "this call proves nothing: an entry is not finite, or there is no memory to compare"
                self._settled[key] = reason
        return self._settled[key] or None

    def judged(self, claim: Claim, variant: str, device: torch.device, again: bool = False) -> Verdict:
        """The verdict on a unit: remembered, or found out now by one process while others wait for it."""
        unit = claim.unit(variant)
        if not again and (known := self.store.verdict(unit)) is not None:
            return known
        with self.store.locked():
            if not again and (known := self.store.verdict(unit)) is not None:
                return known
            request = {
                "device": str(device),
                "suite": claim.evidence.suite,
                "variants": claim.evidence.variants,
                "variant": variant,
                "function": claim.function,
                "reference": claim.reference,
            }
            verdict = self._ask(request)
            self.store.keep_verdict(unit, verdict)
        return verdict

    def failed(self, claim: Claim, arguments: Arguments, exception: Exception) -> str:
        """From now on refuse what a call took, which could not be launched; returns what is said of it."""
        variants = attribute_once(claim.evidence.variants)(*arguments)
        said = [self._fail(claim, str(one), 0.0, 0.0, f"a launch raised {_described(exception)}") for one in variants]
        self._settled.clear()
        return said[0]

    def _settle(
        self,
        claim: Claim,
        variants: Sequence[str],
        arguments: Arguments,
        device: torch.device,
        size: int,
        trusted: str,
    ) -> str | None:
        """Why not, empty if it may be taken; None if this call cannot tell."""
        for variant in variants:
            unit = claim.unit(variant)
            known = self.store.verdict(unit)
            if known is None and trusted == "0":
                return f"{unit}: not verified on this machine, and {VARIABLE}=0 is set; blk doctor --verify does it"
            verdict = self.judged(claim, variant, device)
            if not verdict.passed:
                return f"{unit}: {verdict}"
        fresh = [v for v in variants if not getattr(self.store.verdict(claim.unit(v)), "shadowed", False)]
        if fresh and (reason := self._shadow(claim, variants, arguments, device)) != "":
            return reason
        return self._timed(claim, variants, arguments, device, size)

    def _shadow(self, claim: Claim, variants: Sequence[str], arguments: Arguments, device: torch.device) -> str | None:
        """Compare with the reference on a sample of the call; both round, so that twice the limit is allowed."""
        suite: Suite = attribute_once(claim.evidence.suite)
        sample = suite.sample(arguments)
        if set(map(str, attribute_once(claim.evidence.variants)(*sample))) != set(variants):
            sample = arguments  # fewer modules would go another way
        limit = 2 * suite.limit(sample)
        try:
            found, expected = _with_own_outputs(sample, suite), _with_own_outputs(sample, suite)
            attribute_once(claim.reference)(*expected)
            truth = suite.comparable(expected)
            if not all(bool(one.isfinite().all()) for one in truth):
                return None
            attribute_once(claim.function)(*found)
            Runtime(device).synchronize()
        except torch.OutOfMemoryError:
            return None
        except Exception as exception:
            if not is_of_the_launch(exception):
                raise
            return self._fail(claim, variants[0], 0.0, limit, f"a real call raised {_described(exception)}")
        difference = error(suite.comparable(found), truth)
        if not difference <= limit:
            why = f"a real call differs from the reference by {difference:.1e}, limit {limit:.0e}"
            return self._fail(claim, variants[0], difference, limit, why)
        for variant in variants:
            unit = claim.unit(variant)
            self.store.keep_verdict(unit, replace(self.store.verdict(unit) or Verdict("passed"), shadowed=True))
        return ""

    def _fail(self, claim: Claim, variant: str, found: float, limit: float, why: str) -> str:
        verdict = Verdict("failed", error=found, limit=limit, reason=why)
        self.store.keep_verdict(claim.unit(variant), verdict)
        return f"{claim.unit(variant)}: {verdict}"

    def _timed(
        self, claim: Claim, variants: Sequence[str], arguments: Arguments, device: torch.device, size: int
    ) -> str:
        """The faster of two that are right, measured once per kind and size of call."""
        call = f"{claim.operation} {claim.name} {' + '.join(variants)} 2^{size}"
        choice = self.store.choice(call)
        suite: Suite = attribute_once(claim.evidence.suite)
        outputs = sum(x.nbytes for x in tensors_in(arguments[: suite.outputs]))
        undecided = torch.are_deterministic_algorithms_enabled() or machine.one_of_many()
        if choice is None and not undecided and outputs <= _TIMED_BYTES:
            own = _with_own_outputs(arguments, suite)
            ours, theirs = (_best(attribute_once(path), own, device) for path in (claim.function, claim.reference))
            choice = self.store.keep_choice(call, "reference" if ours > FASTER * theirs else claim.name)
            logger.info("%s: %s, %.3g ms against %.3g ms", call, choice, 1e3 * ours, 1e3 * theirs)
        return _SLOWER_THAN_REFERENCE if choice == "reference" else ""


def is_of_the_launch(exception: Exception) -> bool:
    """Whether Triton could not compile or launch, as opposed to bad arguments or no memory."""
    if isinstance(exception, torch.OutOfMemoryError):
        return False
    of_triton = any(kind.__module__.split(".")[0] == "triton" for kind in type(exception).__mro__)
    return of_triton or "Triton Error" in str(exception)


def verifier(device: torch.device) -> Verifier:
    """That of this process for a device; GPUs of one kind share what is known."""
    facts = machine.facts(device)
    key = tuple(sorted(facts.items()))
    if key not in _verifiers:
        _verifiers[key] = Verifier(Store(machine.cache_folder(), facts), ask)
    return _verifiers[key]


def ask(request: dict[str, str]) -> Verdict:
    """The shared worker's answer; it ends when it has been idle for a while."""
    global _timer
    with _asking:
        if _timer is not None:
            _timer.cancel()
        logger.info("verifying %s: %s", request["function"].rpartition(":")[2], request["variant"])
        verdict = _worker.ask(request)
        _timer = threading.Timer(IDLE_SECONDS, _close)
        _timer.daemon = True
        _timer.start()
    return verdict


def _close() -> None:
    with _asking:
        _worker.close()


_verifiers: dict[Hashable, Verifier] = {}
_worker = Worker()
_asking = threading.Lock()
_timer: threading.Timer | None = None
_attributes: dict[str, Any] = {}


def attribute_once(path: str) -> Any:
    """``worker.attribute``, imported once."""
    if path not in _attributes:
        _attributes[path] = attribute(path)
    return _attributes[path]


def _with_own_outputs(arguments: Arguments, suite: Suite) -> Arguments:
    """The same call with copies of its outputs."""
    copies = mapped(torch.clone, list(arguments[: suite.outputs]))
    return (*copies, *arguments[suite.outputs :])


def _best(function: Function, arguments: Arguments, device: torch.device) -> float:
    """Seconds of the fastest of a few calls; infinite without memory for one."""
    runtime, times = Runtime(device), [float("inf")]
    try:
        while len(times) <= _REPEATS and sum(times[1:]) < _SECONDS:
            times.append(runtime.seconds(lambda: function(*arguments)))
    except torch.OutOfMemoryError:
        return float("inf")
    return min(times)


def _bucket(arguments: Arguments) -> int:
    """Power of two of the number of elements of a call."""
    return sum(x.numel() for x in tensors_in(arguments)).bit_length()


def _described(exception: Exception) -> str:
    return f"{type(exception).__name__}: {exception}".splitlines()[0][:300]
