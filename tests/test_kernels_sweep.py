"""Random calls of the public operations find no kernel in a tile, type or layout that `make aot` does not compile.

Tensors of the meta device, on the way that a GPU's take: any shapes, strides, alignment, masks and mixtures of them, on
GPUs of any size, with whatever candidate tuning would choose.
"""

from __future__ import annotations

import inspect
import math
import random
from types import SimpleNamespace

import pytest
import torch

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.ops import device

pytestmark = pytest.mark.interpret
pytest.importorskip("triton")

from test_kernels_launches import configuration  # noqa: E402

from benchmarks import launches, recorder  # noqa: E402
from benchmarks.roofline import steps  # noqa: E402

TABLES = sorted(set(device.TABLES.values()))
CALLS = 60  # of each operation
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MULTIPROCESSORS = (16, 46, 108, 132, 188)


class Problems(random.Random):
    """Random arguments of each operation."""

    def size(self, most):
        """Mostly small, often a power of two or next to one."""
        size = round(math.exp(self.uniform(0, math.log(most))))
        near = 2 ** round(math.log2(size)) + self.choice((-1, 0, 0, 1))
        return max(1, min(most, self.choice((size, near))))

    def tensor(self, *shape, dtype=torch.float32):
        """In one of the layouts that a caller can have."""
        *outer, rows, columns = (1, *shape) if len(shape) == 1 else shape
        made = self.choice(
            [
                lambda: self.empty(*outer, rows, columns, dtype=dtype),
                lambda: self.empty(*outer, columns, rows, dtype=dtype).mT,
                lambda: self.empty(*outer, rows, 2 * columns, dtype=dtype)[..., ::2],
                lambda: self.empty(*outer, rows, columns + 1, dtype=dtype)[..., 1:],
                lambda: self.empty(*outer, rows, columns + 8, dtype=dtype)[..., 8:],
                lambda: self.empty(*outer, 2 * rows, columns, dtype=dtype)[..., ::2, :],
                lambda: self.empty(*outer, 1, columns, dtype=dtype).expand(*outer, rows, columns),
            ]
        )()
        return made[0] if len(shape) == 1 else made

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def out(self, width):
        """Its elements have their own memory."""
        made = self.empty(width, 2 * width) if self.random() < 0.3 else self.empty(width, width)
        return made[:, ::2] if made.shape[1] > width else self.choice((made, made.mT))

    def mask(self, *shape):
        return self.choice((None, self.tensor(*shape, dtype=torch.bool)))

    def rows(self):
        return self.tensor(self.size(20000), self.size(3000), dtype=self.choice(DTYPES))

    def outer_product(self):
        x = self.rows()
        if self.random() < 0.3:
            return ops.mirror_lower(self.out(self.size(3000)), impl="triton")
        mask, out = self.mask(x.shape[0]), self.out(x.shape[1])
        if self.random() < 0.5:
            return ops.outer_product(x, mask=mask, impl="triton")
        return ops.outer_product(x, mask=mask, out=out, lower=self.random() < 0.5, impl="triton")

    def grouped_outer_product(self):
        xs = [self.rows() for _ in range(self.size(6))]
        masks = [self.mask(x.shape[0]) for x in xs]
        if self.random() < 0.3:
            return ops.grouped_outer_product(xs, masks=masks, impl="triton")
        outs = [self.out(x.shape[1]) for x in xs]
        return ops.grouped_outer_product(xs, masks=masks, outs=outs, lower=self.random() < 0.5, impl="triton")

    def grouped_square_sum(self):
        xs = [self.rows() for _ in range(self.size(6))]
        return ops.grouped_square_sum(xs, masks=[self.mask(x.shape[0]) for x in xs], impl="triton")

    def grouped_incremental_svd(self):
        xs = [self.rows() for _ in range(self.size(6))]
        masks = [self.mask(x.shape[0]) for x in xs]
        columns = [self.size(128) for _ in xs]
        bases = [self.choice((None, self.tensor(x.shape[1], self.size(128)))) for x in xs]
        return ops.grouped_incremental_svd(bases, xs, columns=columns, masks=masks, fresh=self.size(20), impl="triton")

    def grouped_jacobian_covariance(self):
        """LoRA A and B, of one shape or of several."""
        examples, outputs, same = self.size(20), self.size(64), self.random() < 0.5
        a, g, posteriors, masks = [], [], [], []
        for _ in range(self.size(5)):
            if not same or not a:
                tokens, wide, narrow = self.size(300), self.size(3000), self.size(64)
                d_in, d_out = self.choice(((wide, narrow), (narrow, wide)))
                k_in, k_out = (self.choice((d, self.size(min(d, 64)))) for d in (d_in, d_out))
                dtype = self.choice(DTYPES)
            a.append(self.tensor(examples, tokens, d_in, dtype=dtype))
            g.append(self.tensor(examples, outputs, tokens, d_out, dtype=dtype))
            k_in, k_out = min(k_in, 64), min(k_out, 64)
            blocks = self.empty(k_out, k_in), self.empty(k_out), self.empty(k_in), self.empty()
            bases = {"basis_s": self.empty(d_out, k_out), "basis_a": self.empty(d_in, k_in)}
            posteriors.append(SimpleNamespace(**bases, precision_blocks=blocks))
            masks.append(self.mask(examples, tokens))
        return ops.grouped_jacobian_covariance(a, g, posteriors, masks=masks, impl="triton")

    def jacobian_gram(self):
        examples, tokens, d_in, d_out = self.size(10), self.size(300), self.size(3000), self.size(64)
        d_in, d_out = self.choice(((d_in, d_out), (d_out, d_in)))
        dtype = self.choice(DTYPES)
        a = self.tensor(examples, tokens, d_in, dtype=dtype)
        g = self.tensor(examples, self.size(64), tokens, d_out, dtype=dtype)
        return ops.jacobian_gram(a, g, mask=self.mask(examples, tokens), impl="triton")

    def attention_jvp(self):
        dtype, heads, groups = self.choice(DTYPES), self.size(8), self.size(4)
        queries, keys, width, values = self.size(300), self.size(300), self.size(256), self.size(256)
        shapes = (2, heads * groups, queries, width), (2, heads, keys, width), (2, heads, keys, values)
        inputs = [self.tensor(*shape, dtype=dtype) for shape in shapes]
        count = self.size(40)
        changes = [self.choice((None, self.tensor(count, *shape, dtype=dtype))) for shape in shapes]
        changes[0] = self.tensor(count, *shapes[0], dtype=dtype)
        of_mask = self.choice((torch.bool, *DTYPES))
        mask = self.choice((None, self.tensor(2, 1, queries, keys, dtype=of_mask), self.tensor(keys, dtype=of_mask)))
        return ops.attention_jvp(*inputs, *changes, mask=mask, causal=self.random() < 0.5, impl="triton")

    def vocabulary(self):
        examples, samples, width, tokens = self.size(40), self.size(300), self.size(2000), self.size(60000)
        weight = self.tensor(tokens, width, dtype=self.choice(DTYPES))
        name = self.choice(("vocabulary_variance", "vocabulary_logsumexp", "vocabulary_probs", "vocabulary_statistics"))
        operation = getattr(ops, name)
        if name == "vocabulary_variance":
            return operation(weight, self.tensor(examples, width, samples, dtype=self.choice(DTYPES)), impl="triton")
        known = self.empty(examples, samples, dtype=torch.float64)
        options = {
            "bias": self.choice((None, self.empty(tokens))),
            "softcap": self.choice((None, 30.0)),
            "logsumexp": self.choice((None, None, known)),
            "scratch_bytes": self.choice((None, 0, 1 << 24)),
            "targets": self.choice((None, self.empty(examples, dtype=torch.int64))),
        }
        taken = inspect.signature(operation).parameters
        hidden = self.tensor(examples, samples, width, dtype=self.choice(DTYPES))
        return operation(weight, hidden, impl="triton", **{k: v for k, v in options.items() if k in taken})


OPERATIONS = [name for name in vars(Problems) if name in ops.__all__ or name == "vocabulary"]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_random_calls_launch_nothing_that_is_not_compiled(operation, table):
    compiled = {configuration(one) for one in launches.recorded(table).values()}
    problems, seen = Problems(f"{operation} {table}"), set()
    for call in range(CALLS):
        choose = problems.choice((None, lambda key, candidates, run: candidates[-1]))
        with torch.no_grad(), steps.watching(table, problems.choice(MULTIPROCESSORS), choose) as (found, _):
            try:
                getattr(problems, operation)()
            except Exception as error:
                raise AssertionError(f"call {call} of {operation} on {table}") from error
        seen |= {configuration(one.launch) for one in found if isinstance(one, recorder.Issue)}
    assert seen
    assert seen - compiled == set()
