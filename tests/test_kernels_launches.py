"""What `benchmarks.launches` records for `make aot`: every kernel, every configuration, specialised as by Triton."""

from __future__ import annotations

import itertools

import pytest
import torch

from bayesian_lora_kernels.ops import device
from benchmarks import aot, launches, recorder
from benchmarks.launches import BF16, DTYPES, FP32, recorded
from benchmarks.recorder import launched

pytestmark = pytest.mark.interpret
pytest.importorskip("triton")
TABLES = sorted(set(device.TABLES.values()))
# Problems have bfloat16 for both halves where they compile to the same but for the matrix instruction's type.
AS_BF16 = {"wide_output_kernel", "outer_product_kernel", "squares_kernel"}
AS_BF16 |= {"product_kernel", "basis_columns_kernel", "similarities_kernel"}
AS_BF16 |= {"remainder_similarities_kernel", "attention_kernel", "tangents_kernel"}
# Constants that follow from the call, not from a configuration: the columns that an example takes, and the like.
OF_SIZE = {"BAND", "LAG", "PADDED", "MASK"}


def configuration(launch):
    """Kernel, dtype, tile and resources; no flags, of which problems have the variant with the most code."""
    constants = {
        name: str(value)
        for name, value in launch.constants.items()
        if name.isupper() and not isinstance(value, bool) and name not in OF_SIZE
    }
    # Outputs and directions side by side make up the rows of one tile; each K_ has one of the layouts.
    if "O_" in constants:
        constants["rows"] = str(int(constants.pop("C_")) * int(constants.pop("O_")))
        constants["K_"] = str(constants.get("K_") != "0")
    if launch.function == "wide_output_kernel":
        constants["T_"] = str(constants["T_"] != "1")
    widened = launch.constants.get("WIDEN", False)
    data = "bf16" if launch.function in AS_BF16 and launch.data == "fp16" and not widened else launch.data
    for name in ("DTYPE", "AS"):
        constants.pop(name, None)
    options = (launch.num_warps, launch.num_stages, launch.enable_fp_fusion, launch.max_registers)
    return launch.function, data, tuple(sorted(constants.items())), options


def outer_products():
    for height in (0, 1, 100, 5000):
        launches.outer_products((1, 8, 24, 48, 65, 100, 129, 1000), height)


def square_sums():
    launches.square_sums((1, 8, 33))


def weight_gradients():
    sizes = list(itertools.product((1, 8, 17, 300), repeat=2))
    for tokens in (0, 1, 100):
        launches.weight_gradients(sizes, tokens)


def masked_gradients():
    for tokens in (1, 100):
        launches.masked_gradients((1, 8, 33, 300), tokens)


def incremental_svds():
    launches.incremental_svds((1, 16, 33, 65, 128))


def jacobians():
    outputs, narrow, kept = (1, 2, 7, 16, 33, 64), (2, 8, 33, 64), ((0, 0), (0, 30), (1, 10))
    launches.jacobians([(c, n, n - less, k) for c, n, (less, k) in itertools.product(outputs, narrow, kept)])


def jacobians_of_few_tokens():
    sizes = list(itertools.product((1, 2, 3, 5, 16), (2, 8, 64), (1, 2), (0, 7, 30)))
    for tokens in (1, 2):
        launches.jacobians(sizes, [(dtype, False) for dtype in (BF16, FP32)], tokens)


def jacobians_through_tokens():
    sizes = list(itertools.product((1, 3, 17, 32), (2, 64), (1, 2), (1, 7, 16, 32)))
    for tokens in (1, 65, 300):
        launches.jacobians(sizes, [(dtype, True) for dtype in DTYPES], tokens, "by_tokens")


def vocabularies():
    for examples, samples in itertools.product((1, 40), (1, 5, 33, 64, 70, 300)):
        launches.vocabularies(tuple(itertools.product(DTYPES, DTYPES)), examples, samples)


def attentions():
    for tokens in (1, 50):
        launches.attentions((1, 20, 64, 80, 128, 130, 256), DTYPES, tokens)


def what_no_problem_calls():
    from bayesian_lora_kernels.ops.incremental_svd import kernel
    from bayesian_lora_kernels.ops.jacobian_covariance import kernel_launch
    from bayesian_lora_kernels.ops.vocabulary.kernel_launch import vocabulary_logsumexp

    empty = launches._empty
    x, out, rows = empty(200, 320), empty(320, 30), empty(30, 16, dtype=torch.int64)
    kernel.grouped_incremental_svd([out], [empty(320, 0)], [x], [None], [rows], [empty(30, 16)], 10)  # a first batch
    vocabulary_logsumexp(empty(4, 60, dtype=torch.float64), empty(100, 64), empty(4, 60, 64), None, None, True)
    for narrow in (1, 8, 64):
        a, g = empty(3, 50, 300), empty(3, 4, 50, narrow)
        kernel_launch.jacobian_gram(empty(3, 4, 4), a, g, None)


@pytest.mark.parametrize("architecture", TABLES)
@pytest.mark.parametrize(
    "ask",
    [
        outer_products,
        square_sums,
        weight_gradients,
        masked_gradients,
        incremental_svds,
        jacobians,
        jacobians_of_few_tokens,
        jacobians_through_tokens,
        vocabularies,
        attentions,
        what_no_problem_calls,
    ],
    ids=lambda function: function.__name__,
)
def test_other_sizes_launch_no_other_configuration(architecture, ask):
    compiled = {configuration(one) for one in recorded(architecture).values()}
    asked = {configuration(one) for one in launched(architecture, ask)}
    assert asked
    assert asked <= compiled


@pytest.mark.parametrize("architecture", TABLES)
def test_every_kernel_is_recorded(architecture):
    kernels = {
        value.fn.__name__
        for module in recorder.modules()
        for name, value in vars(module).items()
        if recorder.is_kernel(name, value)
    }
    assert {one.function for one in recorded(architecture).values()} == kernels
    expected_of = {*aot.HEIGHTS, *(kernel for kernel, *_ in aot.STACK)}
    assert expected_of <= kernels


def test_an_architecture_is_recorded_as_it_is_whatever_was_recorded_before():
    """Launchers remember what they work out for a layout, and all architectures are recorded with the same tensors."""
    wide = "incremental_svd back_project bf16 CONTIGUOUS HAS_MASK HALVES BM=64 BD=128 BL=128 w8 s3"
    assert [wide in recorded.__wrapped__(table) for table in ("sm_80", "sm_90", "sm_80", "sm_100")] == [False, True] * 2


def test_a_launch_is_specialised_as_triton_does():
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    def mirror():
        kernel_launch.mirror_lower(launches._empty(16, 12))
        kernel_launch.mirror_lower(launches._empty(16, 17)[:, 1:])

    original = kernel_launch.mirror_lower_kernel
    found = launched("sm_90", mirror)
    assert kernel_launch.mirror_lower_kernel is original
    for launch, aligned in zip(found, (("out_ptr", "width"), ("width",)), strict=True):
        assert launch.types == {"out_ptr": "*fp32", "width": "i32", "stride_o0": "i32"}
        assert launch.constants == {"stride_o1": 1, "BD": 64}
        assert launch.aligned == aligned
    assert found[0].name == found[1].name == "outer_product mirror_lower fp32 stride_o1=1 BD=64 w4 s1"


def test_two_alignments_of_one_launch_are_an_error(monkeypatch):
    monkeypatch.setattr(launches, "PROBLEMS", (lambda: launches.square_sums((32,)), launches.mirrored))
    assert len(recorded.__wrapped__("sm_90")) == 7
    from bayesian_lora_kernels.ops.outer_product import kernel_launch

    odd = lambda: kernel_launch.mirror_lower(launches._empty(15, 15))  # noqa: E731
    monkeypatch.setattr(launches, "PROBLEMS", (launches.mirrored, odd))
    with pytest.raises(ValueError, match=r"mirror_lower .* in two ways"):
        recorded.__wrapped__("sm_90")


def test_a_launch_without_an_argument_is_an_error():
    from bayesian_lora_kernels.ops.outer_product import kernel

    def incomplete():
        kernel.mirror_lower_kernel[(1,)](launches._empty(2, 2), num_warps=4, num_stages=1, enable_fp_fusion=False)

    with pytest.raises(TypeError, match="mirror_lower_kernel takes"):
        launched("sm_90", incomplete)
