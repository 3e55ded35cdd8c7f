"""`LaplaceCallback` in a `transformers.Trainer`: the posterior that one would have fitted by hand."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from dense import relative
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.calibration import expected_calibration_error
from bayesian_lora_kernels.integrations.transformers import LaplaceCallback

N, HELD_OUT = 23, 20
QUICK: dict[str, Any] = {"progress": False}


def model(classes: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=classes, initializer_range=0.3,
    )  # fmt: skip
    base = transformers.BertForSequenceClassification(config)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))


def data(n: int = N, seed: int = 0, label: str = "label") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 16, (n, 5), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), label: int(x[0] % 3)} for x in ids]


def trainer(folder: Path, callback: TrainerCallback | None = None, label: str = "label", **more: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 6, "learning_rate": 0.02, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "no", "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 7, "seed": 3,
    }  # fmt: skip
    return Trainer(
        model=model(),
        args=TrainingArguments(str(folder), **{**arguments, **more}),
        train_dataset=data(label=label),
        eval_dataset=data(HELD_OUT, seed=1, label=label),
        callbacks=None if callback is None else [callback],
    )


def batches(examples: list[dict[str, Any]], size: int = 5, label: str = "label") -> list[dict[str, torch.Tensor]]:
    found = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        batch = {key: torch.stack([one[key] for one in part]) for key in ("input_ids", "attention_mask")}
        found.append({**batch, "labels": torch.tensor([one[label] for one in part])})
    return found


def by_hand(trained: Any, **settings: Any) -> blk.LaplaceLoRA:
    return blk.LaplaceLoRA(trained, **settings).fit(batches(data()), progress=False)


TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "what a Trainer drops and keeps": {
        "dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_persistent_workers": True,
        "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3,
    },
    "columns that stay": {"remove_unused_columns": False},
}  # fmt: skip


def by_length() -> dict[str, Any]:
    new = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    return {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}


@pytest.mark.parametrize("name", [*TRAININGS, "by length"])
@pytest.mark.parametrize("curvature", ["ekfac", "exact"])
def test_the_posterior_is_that_of_all_training_data(name: str, curvature: str, tmp_path: Path) -> None:
    more = by_length() if name == "by length" else dict(TRAININGS[name])
    callback = LaplaceCallback(curvature=curvature, seed=5, **QUICK)
    made = trainer(tmp_path, callback, label="labels" if "remove_unused_columns" in more else "label", **more)
    result = made.train()
    assert result.global_step == 6
    laplace = callback.laplace
    assert laplace is not None
    assert laplace.model is made.model
    assert laplace.n_examples == N
    truth = by_hand(made.model, curvature=curvature, seed=5).optimize_prior_precision()
    held_out = batches(data(HELD_OUT, seed=1))[0]
    assert relative(laplace.predict(held_out).covariance, truth.predict(held_out).covariance) < 1e-4
    logged = made.state.log_history[-1]
    assert logged["laplace_log_evidence"] == pytest.approx(float(truth.log_marginal_likelihood()), rel=1e-4)
    assert logged["laplace_prior_precision"] == pytest.approx(float(truth.prior_precision), rel=1e-3)
    values, counts = truth.posterior.curvature.spectrum()
    effective = float((values / (values + float(truth.prior_precision)) * counts).sum())
    assert logged["laplace_effective_parameters"] == pytest.approx(effective, rel=1e-3)
    again = blk.LaplaceLoRA.from_pretrained(made.model, tmp_path)
    assert torch.equal(again.predict(held_out).covariance, laplace.predict(held_out).covariance)


def test_the_model_is_the_best_one(tmp_path: Path) -> None:
    """What `load_best_model_at_end` brings back, not the last one."""
    callback = LaplaceCallback(**QUICK)
    made = trainer(
        tmp_path, callback, load_best_model_at_end=True, save_strategy="steps", save_steps=2, eval_strategy="steps",
        eval_steps=2, learning_rate=2.0, metric_for_best_model="loss",
    )  # fmt: skip
    made.train()
    best = made.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-6")  # of a rate at which it only gets worse
    weights = peft.load_peft_weights(best)
    fresh = model()
    peft.set_peft_model_state_dict(fresh, weights)
    assert blk.LaplaceLoRA.from_pretrained(fresh, tmp_path).n_examples == N


class Recorder(TrainerCallback):
    """As W&B's: what comes through the log."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("evaluated", [True, False])
def test_calibration_and_the_log(evaluated: bool, tmp_path: Path) -> None:
    recorder = Recorder()
    made = trainer(tmp_path, recorder, eval_strategy="steps" if evaluated else "no", eval_steps=3)
    callback = LaplaceCallback(made, calibrate=True, **QUICK)
    made.add_callback(callback)
    made.train()
    truth = by_hand(made.model).optimize_prior_precision().calibrate(batches(data(HELD_OUT, seed=1)), progress=False)
    seen = recorder.seen[-1]
    assert {key: value for key, value in made.state.log_history[-1].items() if key != "step"} == seen
    whole = batches(data(HELD_OUT, seed=1), HELD_OUT)[0]
    logits = made.model.eval()(whole["input_ids"], whole["attention_mask"]).logits
    assert seen["laplace_nll_map"] == pytest.approx(float(cross_entropy(logits.detach(), whole["labels"])), rel=1e-5)
    probs = truth.predict(whole).probs()
    nll = -float(probs[range(HELD_OUT), whole["labels"]].log().mean())
    assert seen["laplace_nll"] == pytest.approx(nll, rel=1e-4)
    assert seen["laplace_ece"] == pytest.approx(expected_calibration_error(probs, whole["labels"]), abs=1e-4)
    assert blk.LaplaceLoRA.from_pretrained(made.model, tmp_path).calibration is not None


def test_without_the_trainer_it_is_in_the_history(tmp_path: Path) -> None:
    recorder = Recorder()
    callback = LaplaceCallback(prior_precision=4.0, folder=tmp_path / "elsewhere", **QUICK)
    made = trainer(tmp_path, callback)
    made.add_callback(recorder)
    made.train()
    assert made.state.log_history[-1]["laplace_prior_precision"] == 4.0
    assert made.state.log_history[-1]["step"] == 6
    assert (tmp_path / "elsewhere" / "laplace.json").is_file()
    assert not any("laplace_prior_precision" in one for one in recorder.seen)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_training_under_autocast(kind: str, tmp_path: Path) -> None:
    callback = LaplaceCallback(**QUICK)
    try:
        made = trainer(tmp_path, callback, **{kind: True})
    except ValueError as error:
        pytest.skip(str(error))
    made.train()
    assert callback.laplace is not None
    assert callback.laplace.log_likelihood is not None
    plain = model()
    plain.load_state_dict(made.model.state_dict())
    truth = by_hand(plain)
    assert callback.laplace.log_likelihood == pytest.approx(truth.log_likelihood, rel=0.02)
    logits = made.model(**{k: v for k, v in batches(data())[0].items() if k != "labels"}).logits
    assert logits.dtype == torch.float32  # as accelerate left it


def test_labels_under_another_name(tmp_path: Path) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model()

        def forward(self, input_ids: Any, attention_mask: Any = None, answers: Any = None) -> Any:
            logits = self.net(input_ids, attention_mask).logits
            loss = None if answers is None else cross_entropy(logits, answers)
            return SequenceClassifierOutput(loss=loss, logits=logits)

    callback = LaplaceCallback(calibrate=True, **QUICK)
    made = trainer(tmp_path, callback, "answers", label_names=["answers"], eval_strategy="steps", eval_steps=3)
    made.model = made.model_wrapped = Renamed()
    made._signature_columns = None
    made.train()
    assert callback.laplace is not None
    assert callback.laplace.log_likelihood == pytest.approx(by_hand(made.model.net).log_likelihood, rel=1e-4)


SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from test_trainer_callback import QUICK, LaplaceCallback, trainer
made = trainer(Path("out"))
kinds = "ekfac", "exact"
callbacks = [
    LaplaceCallback(made, strict=True, calibrate=True, curvature=kind, rank=None, folder=f"out/{kind}", **QUICK)
    for kind in kinds
]
for callback in callbacks:
    made.add_callback(callback)
made.train()
made.save_model()
for kind, callback in zip(kinds, callbacks):
    found = callback.laplace
    print(kind, found.n_examples, float(found.log_marginal_likelihood()), found.calibration, flush=True)
"""


def test_on_two_processes(tmp_path: Path) -> None:
    """23 examples in two shares: each counts once, although the Trainer's own loader repeats one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "script.py",
    ]
    done = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    fresh = model()
    peft.set_peft_model_state_dict(fresh, peft.load_peft_weights(str(tmp_path / "out")))
    held_out = batches(data(HELD_OUT, seed=1))[0]
    for kind in ("ekfac", "exact"):
        said = re.findall(rf"{kind} {N} .*", done.stdout)
        assert len(said) == 2
        assert said[0] == said[1]
        laplace = blk.LaplaceLoRA.from_pretrained(fresh, tmp_path / "out" / kind)
        truth = by_hand(fresh, curvature=kind, rank=None).optimize_prior_precision()
        assert laplace.n_examples == N
        assert laplace.calibration is not None
        assert laplace.calibration.n_labels == HELD_OUT
        assert relative(laplace.predict(held_out).covariance, truth.predict(held_out).covariance) < 1e-4


# ---- what cannot be --------------------------------------------------------------------------------------------------


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from data()


def endless(made: Trainer) -> None:
    made.train_dataset = Endless()


def two_labels(made: Trainer) -> None:
    made.args.label_names = ["labels", "others"]


FAULTS: dict[str, tuple[Any, str]] = {
    "data without an end": (endless, "train_dataset: expected one with a length, got Endless"),
    "two labels": (two_labels, "label_names: expected one, got"),
    "nothing to calibrate with": (lambda made: setattr(made, "eval_dataset", None), "expected evaluation data"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_posterior_that_fails_does_not_cost_the_training(name: str, strict: bool, tmp_path: Path) -> None:
    callback = LaplaceCallback(strict=strict, calibrate=name.startswith("nothing"), **QUICK)
    made = trainer(tmp_path, callback)
    change, message = FAULTS[name]
    change(made)
    if strict:
        with pytest.raises(ValueError, match=message):
            made.train()
    else:
        with pytest.warns(UserWarning, match=f"the model is trained, but has no posterior: ValueError: .*{message}"):
            result = made.train()
        assert math.isfinite(result.training_loss)
    assert made.state.global_step == 6
    assert callback.laplace is None
    assert not (tmp_path / "laplace.json").exists()


def test_bad_settings_are_refused_before_training() -> None:
    with pytest.raises(TypeError, match="ranks: no such setting"):
        LaplaceCallback(ranks=3)
    with pytest.raises(ValueError, match="rank: expected at least 1"):
        LaplaceCallback(rank=0)
    with pytest.raises(TypeError, match=r"trainer: expected a transformers\.Trainer or None, got dict"):
        LaplaceCallback({})
