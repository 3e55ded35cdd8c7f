"""An operation with an implementation that is right, and others with a fault of each kind, to be verified."""

from __future__ import annotations

import itertools
import os
import signal
import time

import torch

from bayesian_lora_kernels.ops.verify.problem import Problem, Suite, off_alignment, poisoned, usual_limit

TILE = 16
_calls = itertools.count()


def reference(out, x, mask):
    """``x^T x`` over the counted rows, slowly: who is right is also faster, unless it tries hard."""
    time.sleep(0.004)
    rows = x.to(out.dtype)[mask]
    out.copy_(rows.T @ rows)


def right(out, x, mask):
    for i, j in itertools.product(range(0, x.shape[1], TILE), repeat=2):
        left, other = (torch.where(mask[:, None], x[:, k : k + TILE], 0).to(out.dtype) for k in (i, j))
        out[i : i + TILE, j : j + TILE] = left.T @ other


def one_wrong_tile(out, x, mask):
    right(out, x, mask)
    out[TILE : 2 * TILE, :TILE] *= 1.001


def one_row_left_unwritten(out, x, mask):
    before = out[-1].clone()
    right(out, x, mask)
    out[-1] = before


def reads_masked_rows(out, x, mask):
    right(out, torch.where(mask[:, None], x, 0 * x), mask | True)


def two_calls_differ(out, x, mask):
    right(out, x, mask)
    out[0, 0] *= 1 + 1e-6 * next(_calls)


def writes_beside_its_output(out, x, mask):
    right(out, x, mask)
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1.0)


def changes_its_input(out, x, mask):
    right(out, x, mask)
    x[0, 0] += 1


def raises(out, x, mask):
    raise RuntimeError("Triton Error [CUDA]: out of resource: shared memory\nRequired: 180224")


def crashes(out, x, mask):
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(out, x, mask):
    time.sleep(1000)


def wrong_when_large(out, x, mask):
    right(out, x, mask)
    if len(x) > 500:
        out *= 2


def slow(out, x, mask):
    right(out, x, mask)
    time.sleep(0.05)


def variants(out, x, mask):
    return ("wide" if x.shape[1] > TILE else "narrow",)


def _problem(rows, width, lay=lambda x: x):
    def arguments(draw):
        mask = draw.mask(rows)
        return draw.output(width, width), lay(poisoned(draw.normal(rows, width), mask)), mask

    return Problem(f"{rows} x {width}", arguments)


SUITE = Suite(
    problems=lambda device: [_problem(33, 40), _problem(50, 9), _problem(20, 33, off_alignment)],
    comparable=lambda arguments: [arguments[0]],
    limit=lambda arguments: usual_limit(arguments[1]),
)
