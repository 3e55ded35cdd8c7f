"""`memory_estimate`: against what a process is measured to take, and against sums of sizes; nothing is touched."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.factor_sums import FactorSums
from bayesian_lora_kernels.memory_estimate import GRAPH, MODEL, ROWS, MemoryEstimate, readable
from bayesian_lora_kernels.model.batches import Batch
from bayesian_lora_kernels.model.deferred import AT_ONCE
from bayesian_lora_kernels.model.dry_run import DryRun, LiveBytes
from bayesian_lora_kernels.model.forward import Forward
from bayesian_lora_kernels.predictive.logits import LogitPredictor
from benchmarks.memory import in_fresh_process
from benchmarks.peak_memory import measurable


@pytest.mark.skipif(not measurable(), reason="no high-water mark that can be reset")
def test_it_is_what_a_process_takes():
    found = in_fresh_process("small, kfac")
    for use in ("fit", "predict"):
        above = [found[kind][use] - found["model"] for kind in ("estimated", "measured")]
        assert 0.8 < above[0] / above[1] < 1.2, found


def estimate(case: models.Case, **arguments: Any) -> MemoryEstimate:
    settings = {**case.arguments, **arguments.pop("settings", {})}
    return LaplaceLoRA(case.model, **settings).memory_estimate(case.batch(), **arguments)


@pytest.mark.parametrize("make", [models.seq2seq, models.mlp])
def test_models_of_all_kinds_run_dry(make: Any):
    case = make()
    found = estimate(case)
    size = sum(x.nbytes for x in [*case.model.parameters(), *case.model.buffers()])
    for parts in (found.fit_parts, found.predict_parts):
        assert parts["cpu"][MODEL] == size
        assert parts["cpu"].get(GRAPH, 0) > 0
    assert found.fit["cpu"] == sum(found.fit_parts["cpu"].values()) > size


def test_the_graph_is_what_autograd_keeps():
    """One pass, without checks: its saved tensors and its output, by PyTorch's own hooks on real tensors."""
    case = models.mlp(n=64, width=32, dtype=torch.float32)
    found = estimate(case, settings={"check": "off", "fisher": "mc", "tokens": "expand"})
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs, _ = case.batch()
    frozen = case.evaluated().requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        frozen(inputs.requires_grad_())
    own = {x.untyped_storage().data_ptr() for x in [inputs, *frozen.parameters()]}
    saved = sum(size for address, size in kept.items() if address not in own)
    assert saved <= found.fit_parts["cpu"][GRAPH] <= 3 * saved


def test_nothing_is_touched_and_no_weight_is_read():
    case = models.mlp(checkpointed=True)
    settings = {"memory_budget": 10**6}
    before = estimate(case, settings=settings)
    state, rng = {k: v.clone() for k, v in case.model.state_dict().items()}, torch.get_rng_state()
    modes = [module.training for module in case.model.modules()]
    for p in case.model.parameters():
        p.data.fill_(math.nan)
    assert estimate(case, settings=settings) == before
    assert all(p.isnan().all() and p.grad is None for p in case.model.parameters())
    assert [module.training for module in case.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert case.model.state_dict().keys() == state.keys()


def test_the_budget_makes_pieces():
    case = models.mlp(n=32, tokens=32, width=32, dtype=torch.float32)
    wide, narrow = (estimate(case, settings={"memory_budget": size, "check": "off"}) for size in (10**9, 80_000))
    assert narrow.fit["cpu"] < wide.fit["cpu"] / 2


def test_predictions_count_the_logits_that_are_known():
    """Gradients of twelve logits take six times those of two; a classifier's configuration says how many it has."""
    steps = {}
    for count in (2, 12):
        case = models.llama(lengths=[6] * 40, classes=range(count), dtype=torch.float32)
        laplace = LaplaceLoRA(case.model, **case.arguments)
        forward = Forward(case.model, None, case.arguments["class_token_ids"])
        predictor = LogitPredictor(case.model, laplace.layers, forward, True, 50_000)
        batch = Batch.of(case.batch(), labels=False)
        steps[count] = predictor.examples_at_once(batch, None)
        assert predictor.examples_at_once(batch, count) == steps[count]
    assert 1 < steps[12] < steps[2] / 4
    assert Forward(models.bert(classes=5).model, None).n_logits == 5


@pytest.mark.parametrize("budget", [10**9, 5000])
def test_rows_of_exact(budget: int):
    case = models.mlp(dtype=torch.float32)  # three logits: two rows for each example, as they only differ
    settings = {"curvature": "exact", "fisher": "exact", "memory_budget": budget}
    each = 2 * 4 * sum(p.numel() for p in case.model.parameters())
    without, some = (estimate(case, settings=settings, n_examples=n) for n in (None, 100))
    assert without.row_bytes == some.row_bytes == each
    assert some.file_bytes == (0 if 100 * each <= budget else 100 * each)
    assert some.predict_parts["cpu"].get(ROWS, 0) == 100 * each - some.file_bytes
    assert without.predict_parts["cpu"].get(ROWS, 0) == 0
    gram = 8 * 200**2
    solutions = some.fit_parts["cpu"]["exact's Gram matrix and solutions"]
    assert solutions >= 3 * gram, "the matrix, its eigenvectors, and what decomposes it"


@pytest.mark.parametrize("n", [0, True, 1.5])
def test_a_wrong_number_of_examples(n: Any):
    with pytest.raises(ValueError, match="n_examples: expected a positive int"):
        estimate(models.mlp(), n_examples=n)


class Asks(nn.Module):
    """Its shapes depend on the numbers that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + torch.unique(y).mean()


def test_a_model_that_goes_by_its_numbers():
    with pytest.raises(RuntimeError, match="memory_estimate: the model does not run without the numbers"):
        LaplaceLoRA(Asks()).memory_estimate((torch.randn(5, 4), torch.zeros(5, dtype=torch.long)))


def test_a_parameter_that_is_no_plain_tensor():
    class Quantised(nn.Parameter):
        pass

    model = models.mlp().model
    model.twice.weight = Quantised(model.twice.weight.detach())
    with pytest.raises(ValueError, match=r"twice\.weight: expected a plain tensor, got a Quantised"):
        LaplaceLoRA(model).memory_estimate((torch.randn(5, 4).double(), torch.zeros(5, dtype=torch.long)))


def test_bytes_of_live_tensors():
    live = LiveBytes()
    dry = DryRun(live, {}, "other", "elsewhere")
    with dry:
        x = torch.empty(10)
        y = x.view(2, 5)
        z = torch.empty(100)
        assert live.now[torch.device("cpu")]["other"] == 440, "a view takes nothing"
        del z
        assert live.now[torch.device("cpu")]["other"] == 40
        del x
        assert live.now[torch.device("cpu")]["other"] == 40, "the view keeps it"
        del y
    assert live.now[torch.device("cpu")]["other"] == 0
    assert live.peak == {torch.device("cpu"): {"other": 440}}


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_900, "1000 kB"), (15 * 10**8, "1.5 GB")]
)
def test_readable(size: int, said: str):
    assert readable(size) == said


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base model and an adapter of which nothing but the configurations is there."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    lora.base_model_name_or_path = str(tmp_path / "base")
    lora.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_doctor_without_weights(place: Path, capsys: Any):
    options = ["--adapter", str(place / "adapter"), "--batch-size", "4", "--length", "8", "--budget", "1MB"]
    assert main(["doctor", *options, "--json", str(place / "out.json")]) == 0
    found = json.loads((place / "out.json").read_text())["memory"]
    weights = 2 * 50 * 16 + 4 * 16 * 16 + 3 * 16 * 24 + 3 * 16 + 2 * 2 * 16
    assert 4 * weights <= found["fit_parts"]["cpu"][MODEL] <= 4 * weights + 200, "and the buffers of the positions"
    assert found["memory_budget"] == 10**6
    assert found["fits"] == {"fit": True, "predict": True}
    assert "fit fits, predict fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batch-size", "4"], "--batch-size: expected with --adapter FOLDER"),
        (["--adapter", "{}", "--length", "8"], "--batch-size, --length: expected both, or neither"),
        (["--adapter", "{}", "--budget", "8GB"], "--batch-size, --length: expected both"),
        (["--adapter", "nowhere", "--batch-size", "4", "--length", "8"], "nowhere: no such folder"),
        (["--adapter", "{}", "--model", "/nowhere", "--batch-size", "4", "--length", "8"], "--base /nowhere: no such"),
        (["--adapter", "{}", "--batch-size", "4", "--length", "8", "--budget", "much"], "expected bytes, such as 8GB"),
    ],
)
def test_doctor_says_what_is_wrong(place: Path, capsys: Any, options: list[str], said: str):
    arguments = ["doctor", *(option.format(place / "adapter") for option in options)]
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err


def test_rows_that_wait_are_within_the_budget():
    """A factor of 300 columns would let 768 rows wait; with a budget for 100 of them, it takes 100 at a time."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(20, 300, generator=generator) for _ in range(12)]
    most = {}
    for budget in (None, 100 * 300 * 4):
        sums = FactorSums(LaplaceConfig(memory_budget=budget))
        waiting = []
        for x in batches:
            sums.add({"a": (x, None)}, AT_ONCE, lambda key: ValueError(key))
            waiting.append(sums.sums["a"].waiting_bytes)
        most[budget] = max(waiting)
        found, tail = sums.finish({"a": 1.0})["a"]
        total = sum(float(x.double().square().sum()) for x in batches)
        assert float(found.double().square().sum() + tail * (300 - found.shape[1])) == pytest.approx(total, rel=1e-5)
    assert most[None] == 12 * 20 * 300 * 4
    assert most[100 * 300 * 4] == 100 * 300 * 4
