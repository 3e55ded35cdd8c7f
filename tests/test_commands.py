"""`blk fit`, `blk evaluate` and `blk predict` on an adapter folder, as a user calls them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from bayesian_lora_kernels import LaplaceConfig, LaplaceLoRA, LogitPosterior, calibration
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.curvature.factors import KroneckerSums

WORDS = ["<unk>", "<s>", "</s>", "A", "B", "C", "Answer", ":", "red", "blue", "green", "fish", "bird", "tree"]
CHOICES = ["A", "B", "C"]
IDS = [3, 4, 5]
PROMPTS = [
    "red fish Answer :",
    "blue bird tree tree Answer :",
    "green Answer :",
    "red red blue fish bird tree Answer :",
    "tree Answer :",
    "fish green blue Answer :",
]
LABELS = [0, 1, 2, 1, 0, 2]


def save_tokenizer(folder: Path, padding_side: str = "left", end: str = "", words: Sequence[str] = WORDS) -> None:
    """With `<s>` before a text, and what `end` says after it."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side=padding_side,
        model_max_length=20,
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `adapter` and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("commands")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    model = peft.get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder / "adapter")
    write_data(folder / "data.jsonl")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the adapter and its data, to write into; the working directory."""
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    shutil.copy(made / "data.jsonl", tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fitted(place: Path, capsys: Any) -> Path:
    assert blk("fit", "--json", "fit.json") == 0
    (place / "fit.out").write_text(capsys.readouterr().out)
    return place


def write_data(path: Path, prompts: Sequence[str] = PROMPTS, labels: Sequence[Any] | None = LABELS) -> None:
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    for row, label in zip(rows, labels or [], strict=False):
        row["label"] = CHOICES[label] if isinstance(label, int) else label
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def blk(command: str, *options: str, choices: Sequence[str] = CHOICES, data: str = "data.jsonl") -> int:
    return main([command, "adapter", data, "--device", "cpu", "--choices", *choices, *options])


def padded(prompts: Sequence[str], side: str) -> dict[str, torch.Tensor]:
    """What a user would write by hand."""
    ids = [[1, *(WORDS.index(word) for word in prompt.split())] for prompt in prompts]
    width = max(map(len, ids)) + 2
    pads = [[0] * (width - len(row)) for row in ids]
    masks = [[1] * len(row) for row in ids]
    if side == "left":
        rows = [pad + row for pad, row in zip(pads, ids, strict=True)]
        mask = [pad + row for pad, row in zip(pads, masks, strict=True)]
    else:
        rows = [row + pad for pad, row in zip(pads, ids, strict=True)]
        mask = [row + pad for pad, row in zip(pads, masks, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def by_hand(made: Path, side: str = "left", **arguments: Any) -> LaplaceLoRA:
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "base")
    model = peft.PeftModel.from_pretrained(base, made / "adapter", is_trainable=True)
    laplace = LaplaceLoRA(model, class_token_ids=IDS, **arguments)
    loader = [padded(PROMPTS[:2], side), padded(PROMPTS[2:], side)]
    for batch, labels in zip(loader, (LABELS[:2], LABELS[2:]), strict=True):
        batch["labels"] = torch.tensor(labels)
    return laplace.fit(loader, progress=False)


def read_lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def predicted(path: str) -> dict[str, torch.Tensor]:
    rows = read_lines(path)
    return {key: torch.tensor([list(row[key].values()) for row in rows]) for key in ("map", "laplace", "logit_std")}


def check_prediction(path: str, truth: LogitPosterior, method: str = "pairwise") -> None:
    """`truth` is of differences."""
    found = predicted(path)
    torch.testing.assert_close(found["map"], truth.probs("map"), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["laplace"], truth.probs(method), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["logit_std"], truth.variance.sqrt(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_three_commands_agree_with_the_class(made: Path, fitted: Path, capsys: Any, side: str) -> None:
    laplace = by_hand(made, side)
    laplace.optimize_prior_precision()
    result = json.loads(Path("fit.json").read_text())
    assert result["n_examples"] == 6
    assert result["n_modules"] == 8
    assert result["n_parameters"] == sum(p.numel() for p in laplace.model.parameters() if p.requires_grad)
    assert result["class_token_ids"] == IDS
    assert result["log_likelihood"] == pytest.approx(laplace.log_likelihood, rel=1e-5)
    assert result["log_marginal_likelihood"] == pytest.approx(float(laplace.log_marginal_likelihood()), rel=1e-4)
    assert result["prior_precision"] == pytest.approx(float(laplace.prior_precision), rel=1e-3)
    printed = Path("fit.out").read_text()
    assert f"{result['log_marginal_likelihood']:.2f}" in printed
    assert "adapter/laplace.json" in printed

    truth = laplace.predict(padded(PROMPTS, side), differences=True)
    write_data(Path("bare.jsonl"), labels=None)
    assert blk("predict", "--json", "p.jsonl", "--batch-size", "2", data="bare.jsonl") == 0
    check_prediction("p.jsonl", truth)
    rows = read_lines("p.jsonl")
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["label"] for row in rows] == [None] * 6
    assert [row["prediction"] for row in rows] == [CHOICES[i] for i in truth.probs("pairwise").argmax(dim=1)]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 + 6
    assert f"{rows[3]['laplace']['B']:.3f}" in printed[6]


@pytest.mark.parametrize("method", ["pairwise", "scalar", "probit", "mc", "bridge"])
def test_evaluate(made: Path, fitted: Path, capsys: Any, method: str) -> None:
    laplace = by_hand(made).optimize_prior_precision()
    posterior, labels = laplace.predict(padded(PROMPTS, "right")), torch.tensor(LABELS)
    options = ["--samples", "20000"] if method == "mc" else ["--plot", "diagram.png", "--plot-risk", "risk.png"]
    assert blk("evaluate", "--method", method, *options, "--json", "e.json") == 0
    result, printed = json.loads(Path("e.json").read_text()), capsys.readouterr().out
    assert (result["n_examples"], result["method"], result["choices"]) == (6, method, CHOICES)
    for key in ("map", "laplace"):
        probs = posterior.probs("map" if key == "map" else method, n_samples=20000)
        truth = {
            "accuracy": (probs.argmax(dim=1) == labels).double().mean(),
            "nll": -probs[range(6), labels].log().mean(),
            "brier": (probs - torch.eye(3)[labels]).square().sum(dim=1).mean(),
        }
        found = result[key]
        for name, value in truth.items():
            assert found[name] == pytest.approx(float(value), abs=2e-2 if (key, method) == ("laplace", "mc") else 1e-4)
        more = {
            "ece": calibration.expected_calibration_error(probs, labels),
            "ece_adaptive": calibration.adaptive_calibration_error(probs, labels),
            "ece_debiased": calibration.debiased_calibration_error(probs, labels),
            "error_auroc": calibration.error_auroc(probs, labels),
            "aurc": calibration.risk_coverage(probs, labels).area,
        }
        assert found.keys() == {*truth, *more, "ece_interval"}
        if method != "mc":
            assert {name: found[name] for name in more} == pytest.approx(more, abs=1e-4)
            interval = calibration.calibration_error_interval(probs, labels)
            assert found["ece_interval"] == pytest.approx(
                {"low": interval.low, "high": interval.high, "level": 0.95}, abs=1e-3
            )
    lines = printed.splitlines()
    for title, name in (
        ("ACC", "accuracy"),
        ("NLL", "nll"),
        ("Brier", "brier"),
        ("ECE", "ece"),
        ("ECE, bins of equal mass", "ece_adaptive"),
        ("RMS calibration error, debiased", "ece_debiased"),
        ("AUROC, errors by confidence", "error_auroc"),
        ("area under risk-coverage", "aurc"),
    ):
        numbers = [f"{result[key][name]:.4f}" for key in ("map", "laplace")]
        (line,) = [line for line in lines if line.startswith(title + "  ")]
        assert line.removeprefix(title).split() == numbers
    (line,) = [line for line in lines if line.startswith("  95% interval  ")]
    assert line.split()[2::3] == [f"{result[key]['ece_interval']['low']:.4f}" for key in ("map", "laplace")]
    if method != "mc":
        for name, kind in (("diagram.png", "reliability"), ("risk.png", "risk-coverage")):
            assert Path(name).read_bytes().startswith(b"\x89PNG")
            assert f"{kind} diagram written to {name}" in printed


def test_a_metric_that_is_not_there(fitted: Path, capsys: Any) -> None:
    """Of a model that is always right nobody can say how well it tells its errors."""
    assert blk("predict", "--json", "p.jsonl", "--uncalibrated") == 0
    write_data(Path("right.jsonl"), labels=[row["prediction"] for row in read_lines("p.jsonl")])
    capsys.readouterr()
    assert blk("evaluate", "--uncalibrated", "--json", "e.json", "--plot-risk", "r.svg", data="right.jsonl") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("AUROC")]
    assert line.split()[-1] == "-"
    assert json.loads(Path("e.json").read_text(), parse_constant=pytest.fail)["laplace"]["error_auroc"] is None
    assert not Path("diagram.png").exists()


def test_a_plot_that_cannot_be(fitted: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--plot d.txt: expected a name that ends in .png" in error_of(capsys, "evaluate", "--plot", "d.txt")
    assert "the folder nowhere does not exist" in error_of(capsys, "evaluate", "--plot", "nowhere/d.png")
    assert "--plot-risk d.txt: expected a name that ends" in error_of(capsys, "evaluate", "--plot-risk", "d.txt")
    assert "--plot-risk nowhere/d.png: the folder" in error_of(capsys, "evaluate", "--plot-risk", "nowhere/d.png")
    message = error_of(capsys, "evaluate", "--plot", "d.png", "--plot-risk", "./d.png")
    assert "--plot-risk d.png: --plot names the same file" in message
    monkeypatch.setattr("bayesian_lora_kernels.commands.output.find_spec", lambda name: None)
    for option in ("--plot", "--plot-risk"):
        assert f"{option}: needs matplotlib; pip install matplotlib" in error_of(capsys, "evaluate", option, "d.png")


BFLOAT16_ROWS = {"curvature": "exact", "row_dtype": torch.bfloat16}
REDUCED = {"fisher": "exact", "fisher_samples": 2, "tokens": "reduce"}


@pytest.mark.parametrize(
    ("options", "arguments", "per_module"),
    [
        (["--curvature", "ekfac", "--rank", "full"], {"curvature": "ekfac", "rank": None}, False),
        (["--curvature", "exact"], {"curvature": "exact"}, False),
        (["--per-module", "--modules", "none"], {}, True),
        (["--modules", ".*q_proj.*"], {"modules": ".*q_proj.*"}, False),
        (["--no-tail", "--rank", "1", "--rank-threshold", "8"], {"tail": False, "rank": 1, "rank_threshold": 8}, False),
        (["--fisher", "exact", "--fisher-samples", "2", "--tokens", "reduce"], REDUCED, False),
        (
            ["--curvature", "exact", "--row-dtype", "bfloat16"],
            {"curvature": "exact", "row_dtype": torch.bfloat16},
            False,
        ),
    ],
)
def test_options_of_fit(made: Path, place: Path, options: Any, arguments: Any, per_module: bool) -> None:
    assert blk("fit", *options, "--out", "deep/er") == 0
    assert not (place / "adapter" / "laplace.json").exists()
    laplace = by_hand(made, **arguments)
    laplace.optimize_prior_precision(per_module=per_module)
    assert blk("predict", "--posterior", "deep/er", "--json", "p.jsonl") == 0
    check_prediction("p.jsonl", laplace.predict(padded(PROMPTS, "right"), differences=True))


@pytest.mark.parametrize("curvature", ["kfac", "exact"])
def test_an_adapter_with_dora(made: Path, place: Path, capsys: Any, curvature: str) -> None:
    """Its magnitudes come from the adapter's file and stay as they are there."""
    shutil.rmtree("adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "base")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_dora=True)
    model = peft.get_peft_model(base, config)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=noise)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(torch.rand(parameter.shape, generator=noise) + 0.5)
    model.save_pretrained("adapter")
    assert blk("fit", "--curvature", curvature) == 0
    assert blk("predict", "--json", "p.jsonl") == 0
    laplace = LaplaceLoRA(model, class_token_ids=IDS, curvature=curvature)
    loader = [{**padded(PROMPTS, "left"), "labels": torch.tensor(LABELS)}]
    laplace.fit(loader, progress=False).optimize_prior_precision()
    check_prediction("p.jsonl", laplace.predict(padded(PROMPTS, "right"), differences=True))
    assert main(["doctor", "--adapter", "adapter", "--data", "data.jsonl", "--choices", *CHOICES]) == 0
    assert "DoRA's norms held" in capsys.readouterr().out


def test_every_setting_is_an_option_but_four(place: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    absent = {one.name for one in dataclasses.fields(LaplaceConfig) if f"--{one.name.replace('_', '-')} " not in shown}
    assert absent == {"class_token_ids", "likelihood", "noise_variance", "prior_precision"}
    assert "--memory-budget: expected at least 1, got 0" in error_of(capsys, "fit", "--memory-budget", "0")


def test_fit_goes_on_from_a_checkpoint(place: Path, capsys: Any) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:  # at the last moment
        patch.setattr(KroneckerSums, "factors", stop)
        assert blk("fit", "--checkpoint", "kept") == 130
    capsys.readouterr()
    assert (place / "kept" / "0/rank-0-of-1" / "checkpoint.json").exists()
    assert "of another fit: settings.seed" in error_of(capsys, "fit", "--checkpoint", "kept", "--seed", "1")
    assert blk("fit", "--checkpoint", "kept") == 0
    kept = (place / "adapter" / "laplace.json").read_text()
    assert not any((place / "kept").iterdir())
    assert blk("fit") == 0
    assert (place / "adapter" / "laplace.json").read_text() == kept


def test_monte_carlo_does_not_depend_on_the_batch_size(fitted: Path) -> None:
    for size in ("1", "4"):
        assert blk("predict", "--method", "mc", "--samples", "64", "--batch-size", size, "--json", size) == 0
    torch.testing.assert_close(predicted("1")["laplace"], predicted("4")["laplace"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("side", "end"), [("right", ""), ("left", "</s>")])
def test_the_adapters_own_tokenizer(fitted: Path, side: str, end: str) -> None:
    """Its padding side does not matter, nor what it puts after a text."""
    assert blk("predict", "--json", "before") == 0
    save_tokenizer(fitted / "adapter", side, end)
    assert blk("predict", "--json", "after") == 0
    assert read_lines("before") == read_lines("after")


def test_a_long_prompt_keeps_its_end(fitted: Path, capsys: Any) -> None:
    write_data(Path("long.jsonl"), ["bird bird bird " + PROMPTS[1], PROMPTS[2]], None)
    write_data(Path("short.jsonl"), PROMPTS[1:3], None)
    assert blk("predict", "--max-length", "7", "--json", "long", data="long.jsonl") == 0
    assert "1 of 2 prompts are longer than 7 tokens and lost their beginning" in capsys.readouterr().err
    assert blk("predict", "--json", "short", data="short.jsonl") == 0
    assert "warning" not in capsys.readouterr().err
    assert read_lines("long") == read_lines("short")
    write_data(Path("long.jsonl"), ["bird " * 50], None)
    assert blk("predict", data="long.jsonl") == 0
    assert "1 of 1 prompts are longer than 20 tokens" in capsys.readouterr().err  # the tokenizer's limit


def test_labels_as_text_and_as_indices(place: Path) -> None:
    write_data(Path("other.jsonl"), labels=["A", " B", "C ", "B", "A", "C"])
    with open("indices.jsonl", "w") as file:
        for prompt, label in zip(PROMPTS, LABELS, strict=True):
            file.write(json.dumps({"label": label, "prompt": prompt, "more": []}) + "\n\n")
    results = []
    for data in ("data.jsonl", "other.jsonl", "indices.jsonl"):
        assert blk("fit", "--json", "fit.json", data=data) == 0
        results.append(json.loads(Path("fit.json").read_text())["log_likelihood"])
    assert results[0] == results[1] == results[2]


def test_the_base_on_the_command_line(made: Path, fitted: Path) -> None:
    assert blk("predict", "--json", "before") == 0
    edit_config(fitted, base_model_name_or_path="/gone/base")
    shutil.copytree(made / "base", fitted / "moved")
    assert blk("predict", "--base", "moved", "--json", "after") == 0
    assert read_lines("before") == read_lines("after")


def edit_config(place: Path, **changes: Any) -> None:
    path = place / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def error_of(capsys: Any, command: str, *options: str, **more: Any) -> str:
    """The one line on stderr, with exit code 2 and nothing on stdout."""
    capsys.readouterr()
    assert blk(command, *options, **more) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"blk {command}: ")
    return str(err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "red", "label": "A"}\n\n{"prompt": "red" "A"}', "bad.jsonl:3: not JSON"),
        ('["red", "A"]', ":1: expected an object"),
        ('{"text": "red", "label": "A"}', ':1: no "prompt" and no "messages"; its keys are "text", "label"'),
        ('{"prompt": 3, "label": "A"}', ':1: "prompt": expected text, got 3'),
        ('{"prompt": "red", "label": true}', ":1: label true is not among"),
    ],
)
def test_bad_data(place: Path, capsys: Any, content: str, message: str) -> None:
    Path("bad.jsonl").write_text(content)
    assert message in error_of(capsys, "fit", data="bad.jsonl")


def test_an_index_that_may_be_a_choice(place: Path, capsys: Any) -> None:
    Path("bad.jsonl").write_text('{"prompt": "red", "label": 1}\n')
    message = error_of(capsys, "fit", data="bad.jsonl", choices=["1", "2"])
    assert "label 1 may be the choice '1' or an index into the choices" in message
    Path("bad.jsonl").write_text('{"prompt": "red", "label": 2}\n')
    assert 'write the choice as text, "2"' in error_of(capsys, "fit", data="bad.jsonl", choices=["1", "2"])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["A"], "--choices: expected at least two"),
        (["A", ""], "'' has no token"),
        (["A", "elephant"], "'elephant' is not in this model's vocabulary; a leading space (' elephant')"),
        (["A", "red fish", "red bird"], "'red fish' and 'red bird' begin with the same token 'red'"),
    ],
)
def test_bad_choices(place: Path, capsys: Any, choices: list[str], message: str) -> None:
    Path("one.jsonl").write_text(json.dumps({"prompt": "red", "label": choices[0]}) + "\n")
    assert message in error_of(capsys, "fit", choices=choices, data="one.jsonl")


def test_files_that_are_not_there(place: Path, capsys: Any) -> None:
    assert "adapter: no posterior (laplace.json) in it; run blk fit first" in error_of(capsys, "predict")
    assert "run blk fit first" in error_of(capsys, "evaluate")
    assert "this is the file of examples" in error_of(capsys, "fit", "--json", "../" + place.name + "/data.jsonl")
    assert "data.jsonl is a file, expected a folder" in error_of(capsys, "fit", "--out", "data.jsonl/deep")
    Path("adapter/adapter_model.safetensors").unlink()
    assert "adapter: no adapter weights in it" in error_of(capsys, "fit")
    Path("adapter/adapter_config.json").unlink()
    assert "adapter: no adapter_config.json in it" in error_of(capsys, "fit")


def test_a_base_that_does_not_serve(made: Path, place: Path, capsys: Any) -> None:
    assert "--base ./gone: no such folder" in error_of(capsys, "fit", "--base", "./gone")
    edit_config(place, base_model_name_or_path="someone/a-model-that-is-not-here")
    assert "is not on this machine; pass --base FOLDER" in error_of(capsys, "fit")
    edit_config(place, base_model_name_or_path="/gone/base")
    assert "its base model /gone/base is not there" in error_of(capsys, "fit")
    shutil.copytree(made / "base", "broken")
    Path("broken/model.safetensors").unlink()
    assert "base model broken: cannot be loaded" in error_of(capsys, "fit", "--base", "broken")
    edit_config(place, base_model_name_or_path=None)
    assert "it does not name the base model; pass --base FOLDER" in error_of(capsys, "fit")
    edit_config(place, task_type="TOKEN_CLS")
    assert "this one is for TOKEN_CLS" in error_of(capsys, "fit")


@pytest.mark.parametrize("change", [{"hidden_size": 32}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_base(made: Path, place: Path, capsys: Any, change: dict[str, int]) -> None:
    config = transformers.AutoConfig.from_pretrained(made / "base", **change)
    transformers.LlamaForCausalLM(config).save_pretrained("other")
    save_tokenizer(place / "other")
    assert "adapter does not fit the base model other" in error_of(capsys, "fit", "--base", "other")


def test_a_posterior_of_something_else(fitted: Path, capsys: Any) -> None:
    message = error_of(capsys, "predict", choices=["A", "C", "B"])
    assert "begin with the tokens 'A' 'C' 'B'" in message
    assert "was fitted for 'A' 'B' 'C', in this order" in message
    shutil.copytree("adapter", "saved")
    tensors = safetensors_load("adapter/adapter_model.safetensors")
    safetensors_save({name: 2 * value for name, value in tensors.items()}, "adapter/adapter_model.safetensors")
    message = error_of(capsys, "predict", "--posterior", "saved")
    assert "weights are not those the posterior was fitted to" in message


@pytest.mark.parametrize("name", ["base/model.safetensors", "base/config.json"])
def test_a_file_that_is_cut_off(made: Path, place: Path, capsys: Any, name: str) -> None:
    shutil.copytree(made / "base", "base")
    Path(name).write_bytes(Path(name).read_bytes()[:-40])
    assert "cannot be loaded" in error_of(capsys, "fit", "--base", "base")


def test_a_tokenizer_of_another_model(place: Path, capsys: Any) -> None:
    save_tokenizer(place / "adapter", words=[*WORDS, "elephant"])
    write_data(Path("foreign.jsonl"), ["elephant Answer :"])
    assert "it makes token 14 of the prompts" in error_of(capsys, "fit", data="foreign.jsonl")


def test_weights_that_are_not_finite(place: Path, capsys: Any) -> None:
    tensors = safetensors_load("adapter/adapter_model.safetensors")
    safetensors_save({name: torch.nan * value for name, value in tensors.items()}, "adapter/adapter_model.safetensors")
    assert "not finite" in error_of(capsys, "fit")
    assert not Path("adapter/laplace.json").exists()


def safetensors_load(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def safetensors_save(tensors: dict[str, torch.Tensor], path: str) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "options",
    [
        ["--batch-size", "0"],
        ["--rank", "some"],
        ["--curvature", "diagonal"],
        ["--max-length", "-1"],
        ["--modules", "("],
        ["--seed", "9" * 30],
        ["--row-dtype", "float4_e2m1fn_x2"],
    ],
)
def test_bad_options(place: Path, capsys: Any, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        blk("fit", *options)
    assert stop.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_room_for_special_tokens_alone(place: Path, capsys: Any) -> None:
    assert "--max-length: expected more than 1" in error_of(capsys, "fit", "--max-length", "1")


@pytest.mark.parametrize("choices", [CHOICES, ()], ids=["choices", "vocabulary"])
def test_doctor_on_an_adapter(place: Path, capsys: Any, choices: Sequence[str]) -> None:
    options = ["--adapter", "adapter", "--data", "data.jsonl", "--json", "doctor.json"]
    assert main(["doctor", *options, *(["--choices", *choices] if choices else [])]) == 0
    printed, report = capsys.readouterr().out, json.loads(Path("doctor.json").read_text())
    assert "Jacobians against autograd, in float64" in printed
    assert report["ok"]
    assert report["model"]["ok"]
    assert sum(one["error"] is not None for one in report["model"]["agreements"]) >= 3


def test_doctor_needs_data(place: Path, capsys: Any) -> None:
    assert main(["doctor", "--adapter", "adapter"]) == 2
    assert "--data: expected a file of JSON lines" in capsys.readouterr().err
