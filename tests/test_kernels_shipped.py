"""What the Triton launchers launch, over their whole range of sizes, against what `shipped()` lists for `make aot`.

Launches are recorded instead of run. A launch is known by its kernel, the dtype of the data, its tile sizes, warps,
stages and registers. Flags (masked, accumulating, ...) are left out: the lists hold the variant with the most code.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from bayesian_lora_kernels.ops.shipped import ARCHITECTURES, KERNEL_MODULES

pytestmark = pytest.mark.interpret
pytest.importorskip("triton")
OPS = "bayesian_lora_kernels.ops"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# A list holds bfloat16 for both halves where they compile to the same but for the matrix instruction's type.
AS_BF16 = {"wide_output_kernel", "outer_product_kernel", "grouped_outer_product_kernel", "fresh_kernel"}
# Loops over kept directions have a length that is known at run time only.
AS_KEPT_16 = {"wide_input_kernel", "wide_output_kernel"}
VOCABULARY = {"exponentials_kernel", "means_kernel", "squares_kernel"}


class Recorder:
    """Stands in for a kernel."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, num_stages, enable_fp_fusion, maxnreg=None, **constants):
            values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
            assert sorted(values) == sorted(self.kernel.arg_names)
            types = {name: NAMES.get(value.dtype) for name, value in values.items() if torch.is_tensor(value)}
            constants = {name: values[name] for name in self.kernel.arg_names if is_constant(name, values[name])}
            options = (num_warps, num_stages, enable_fp_fusion, maxnreg)
            self.launches.add(key(self.kernel, types, constants, options))

        return launch


def is_constant(name, value):
    """Whether it is a `tl.constexpr` that is no flag: by our house rule an upper-case name.

    Without those that lists hold one value of: the columns that an example of the vocabulary operations takes.
    """
    return name.isupper() and not isinstance(value, bool) and name not in ("BAND", "LAG", "PADDED")


def key(kernel, types, constants, options):
    name = kernel.fn.__name__
    constants = {one: str(value) for one, value in constants.items()}
    data = types.get("x_ptr") or constants.pop("DTYPE", "")
    # Outputs and directions side by side make up the rows of one tile.
    if "O_" in constants:
        constants["rows"] = str(int(constants.pop("C_")) * int(constants.pop("O_")))
    if name in AS_KEPT_16 and constants["K_"] != "0":
        constants["K_"] = "16"
    data = data.lstrip("*")
    if name in VOCABULARY:
        data = types["weight_ptr"] + types["columns_ptr"]
        data = "*bf16*bf16" if data == "*fp16*fp16" else data
    if name in AS_BF16 and data == "fp16":
        data = "bf16"
    return name, data, tuple(sorted(constants.items())), options


def listed(architecture):
    found = set()
    for module in KERNEL_MODULES:
        for one in importlib.import_module(module).shipped(architecture):
            constants = {name: value for name, value in one.constants.items() if is_constant(name, value)}
            options = (one.num_warps, one.num_stages, one.enable_fp_fusion, one.max_registers)
            found.add(key(one.kernel, one.types, constants, options))
    return found


@pytest.fixture(params=ARCHITECTURES)
def world(request, monkeypatch):
    """The architecture, what is listed for it, and the set that records launches as on a GPU of 132 multiprocessors."""
    expected, launches = listed(request.param), set()
    for name in (
        "outer_product.kernel",
        "outer_product.kernel_grouped",
        "incremental_svd.kernel",
        "incremental_svd.columns",
        "jacobian_covariance.kernel",
        "square_sum.kernel",
        "vocabulary.kernel",
        "vocabulary.kernel_scratch",
        "vocabulary.kernel_launch",
    ):
        module = importlib.import_module(f"{OPS}.{name}")
        for attribute in [one for one in vars(module) if one.endswith("_kernel")]:
            monkeypatch.setattr(module, attribute, Recorder(getattr(module, attribute), launches))
        if hasattr(module, "architecture"):
            monkeypatch.setattr(module, "architecture", lambda device: request.param)
        if hasattr(module, "multiprocessors"):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        if hasattr(module, "choose_configuration"):
            monkeypatch.setattr(module, "choose_configuration", launch_all)
    return expected, launches


def launch_all(key, candidates, run):
    for candidate in candidates:
        run(candidate)
    return candidates[0]


def kernels_of(launches, *names):
    return {one for one in launches if one[0] in names}


def rows_of(height, width, dtype, transposed=False):
    return torch.empty(width, height, dtype=dtype).T if transposed else torch.empty(height, width, dtype=dtype)


def test_outer_products(world):
    from bayesian_lora_kernels.ops.outer_product import kernel, kernel_grouped

    expected, launches = world
    widths = (1, 8, 16, 24, 32, 48, 64, 65, 100, 128, 129, 1000, 4096)
    for dtype, width, height, transposed, masked in itertools.product(
        DTYPES, widths, (0, 1, 100, 5000), (False, True), (False, True)
    ):
        x, out = rows_of(height, width, dtype, transposed), torch.empty(width, width)
        mask = torch.empty(height, dtype=torch.bool) if masked else None
        kernel.outer_product(out, x, mask, 1.0, masked)
        kernel_grouped.grouped_outer_product([out], [x], [mask], [1.0], masked)
    kernel.mirror_lower(torch.empty(100, 100))
    names = {"outer_product_kernel", "sum_splits_kernel", "mirror_lower_kernel"}
    names |= {"grouped_outer_product_kernel", "grouped_sum_splits_kernel"}
    assert launches == kernels_of(expected, *names)


def test_square_sums(world):
    from bayesian_lora_kernels.ops.square_sum import kernel

    expected, launches = world
    for dtype, width, transposed in itertools.product(DTYPES, (1, 8, 32, 33, 4096), (False, True)):
        kernel.grouped_square_sum(torch.empty(1, dtype=torch.float64), [rows_of(64, width, dtype, transposed)], [None])
    assert launches == kernels_of(expected, "square_sum_kernel")


def test_incremental_svd(world, monkeypatch):
    from bayesian_lora_kernels.ops.incremental_svd import kernel

    expected, launches = world
    monkeypatch.setattr(kernel._Update, "_combination", lambda update, core, gram: core)
    for dtype, columns, height, transposed, first in itertools.product(
        DTYPES, (1, 16, 30, 33, 64, 65, 128), (200, 9000), (False, True), (False, True)
    ):
        x = rows_of(height, 256, dtype, transposed)
        basis, out = torch.empty(256, 0 if first else columns), torch.empty(256, columns)
        drawn = torch.zeros(columns, 16, dtype=torch.int64), torch.ones(columns, 16)
        kernel.incremental_svd(out, basis, x, None, *drawn, 10)
    names = {one[0] for one in launches}
    assert {"project_kernel", "back_project_kernel", "touch_kernel", "apply_kernel", "gram_kernel"} <= names
    assert launches == kernels_of(expected, *names)


def test_jacobians(world, monkeypatch):
    from bayesian_lora_kernels.ops.jacobian_covariance import kernel_launch

    expected, launches = world
    on_gpu = lambda wide, wide_input: wide_input and wide.dtype == torch.bfloat16  # noqa: E731
    monkeypatch.setattr(kernel_launch, "_planes", on_gpu)
    for dtype, outputs, narrow, wide_input in itertools.product(
        DTYPES, (1, 2, 4, 7, 16, 32, 33, 64), (1, 2, 8, 16, 33, 64), (True, False)
    ):
        a = torch.empty(1, 64, 128 if wide_input else narrow, dtype=dtype)
        g = torch.empty(1, outputs, 64, narrow if wide_input else 128, dtype=dtype)
        out = torch.empty(1, outputs, outputs)
        kernel_launch.jacobian_gram(out, a, g, None)
        for kept_narrow, kept in itertools.product({narrow - 1, narrow}, (10, 30, 60)):
            k_a, k_s = (kept, kept_narrow) if wide_input else (kept_narrow, kept)
            bases = torch.empty(g.shape[3], k_s), torch.empty(a.shape[2], k_a)
            weights = torch.ones(k_s, k_a), torch.ones(k_s), torch.ones(k_a), torch.ones(())
            kernel_launch.jacobian_covariance(out, a, g, *bases, *weights, None)
    names = {one[0] for one in launches}
    assert {"wide_input_kernel", "wide_output_kernel", "kept_rows_kernel", "narrow_rows_kernel"} <= names
    assert launches == kernels_of(expected, *names)


def test_vocabulary(world, monkeypatch):
    from bayesian_lora_kernels.ops.vocabulary import kernel_launch

    expected, launches = world
    monkeypatch.setattr(kernel_launch, "_as_planes", lambda weight: weight.dtype == torch.bfloat16)
    for of_weight, of_hidden, examples, samples in itertools.product(DTYPES, DTYPES, (1, 40), (1, 5, 33, 64, 70, 300)):
        weight, hidden = torch.empty(200, 16, dtype=of_weight), torch.empty(examples, samples, 16, dtype=of_hidden)
        entropy, information, log_prob = torch.empty(3, examples)
        targets, lse = torch.zeros(examples, dtype=torch.int64), torch.empty(examples, samples, dtype=torch.float64)
        out = torch.empty(examples, 200)
        kernel_launch.vocabulary_logsumexp(lse, weight, hidden, None, None)
        kernel_launch.vocabulary_variance(out, weight, hidden.mT)
        for scratch_bytes, known in itertools.product((None, 0), (None, lse)):
            kernel_launch.vocabulary_probs(out, weight, hidden, None, None, known, scratch_bytes)
            kernel_launch.vocabulary_statistics(
                entropy, information, log_prob, weight, hidden, None, None, targets, known, scratch_bytes
            )
    names = VOCABULARY | {"merge_kernel", "stored_means_kernel", "stored_statistics_kernel"}
    assert launches == kernels_of(expected, *names)
