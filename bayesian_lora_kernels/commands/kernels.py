"""`blk doctor --verify`: every kernel against float64 on this machine, as the first call that takes it would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import InputError
from bayesian_lora_kernels.commands.parts import Part, Table
from bayesian_lora_kernels.ops.dispatch import claims, machine_refuses
from bayesian_lora_kernels.ops.verify.machine import Runtime, facts
from bayesian_lora_kernels.ops.verify.verifier import Claim, attribute_once, verifier
from bayesian_lora_kernels.ops.verify.worker import catalogue


def verify_kernels(pattern: str) -> dict[str, Any]:
    """Judge every unit whose name the regular expression finds; what was known of it is replaced.

    Returns:
        `devices` (what each is, and where verdicts are kept), `units` (verdicts, with `unit` and `device`), and `ok`:
        whether none failed.

    Raises:
        InputError: no device to verify on, a bad expression, or one that finds nothing.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--verify: expected a regular expression, got {pattern!r}: {error}") from None
    if reason := machine_refuses("triton"):
        raise InputError(f"--verify: nothing to verify: {reason}")
    devices = _devices()
    units = [
        (device, claim, variant)
        for device in devices
        for claim in claims()
        if machine_refuses(claim.name) is None
        for variant in _variants(claim, device)
        if wanted.search(claim.unit(variant))
    ]
    if not units:
        raise InputError(f"--verify: expected an expression that finds a unit, got {pattern!r}")
    rows = []
    for device, claim, variant in output.bar(units, desc="verify", unit="unit"):
        verdict = verifier(device).judged(claim, variant, device, again=True)
        rows.append({"unit": claim.unit(variant), "device": str(device), **verdict.as_json()})
    about = [{"device": str(one), "facts": facts(one), "file": str(verifier(one).store.path)} for one in devices]
    return {"devices": about, "units": rows, "ok": all(row["state"] != "failed" for row in rows)}


def format_kernels(report: dict[str, Any]) -> list[Part]:
    """A table to read, or to send."""
    rows = [("unit", "", "error", "limit", "problems", "seconds")]
    for row in report["units"]:
        shown = (f"{row['error']:.1e}", f"{row['limit']:.0e}", str(row["problems"]), f"{row['seconds']:.1f}")
        rows.append((row["unit"], row["state"], *shown))
    lines: list[Part] = [Table(rows, left=2)]
    lines += [f"{row['unit']}: {row['reason']}" for row in report["units"] if row["reason"]]
    for one in report["devices"]:
        known = one["facts"]
        name = known.get("gpu", "Triton's interpreter")
        lines.append(
            f"\n{one['device']}: {name}, torch {known['torch']}, triton {known['triton']}; kept in {one['file']}"
        )
    return lines


def _devices() -> list[torch.device]:
    """One GPU of each kind; without, the CPU, for the interpreter."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    kinds = {tuple(sorted(facts(one).items())): one for one in map(torch.device, _names())}
    return list(kinds.values())


def _names() -> Iterator[str]:
    yield from (f"cuda:{i}" for i in reversed(range(torch.cuda.device_count())))


def _variants(claim: Claim, device: torch.device) -> list[str]:
    """Every variant that a problem of the claim's suite takes."""
    with torch.no_grad():
        suite, variants = attribute_once(claim.evidence.suite), attribute_once(claim.evidence.variants)
        return sorted({one for _, some in catalogue(suite.problems(device), variants, Runtime(device)) for one in some})
