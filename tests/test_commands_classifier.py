"""The commands on adapters of classifiers: labels, heads, padding and truncation, against the class itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_commands import (
    LABELS,
    PROMPTS,
    WORDS,
    check_prediction,
    read_lines,
    safetensors_load,
    safetensors_save,
    save_tokenizer,
)

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.calibration import negative_log_likelihood
from bayesian_lora_kernels.cli import main

NAMES = ["bad", "fair", "good"]
SIZES: dict[str, Any] = dict(
    vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
CONFIGS = {
    "llama": lambda **more: transformers.LlamaConfig(**SIZES, num_key_value_heads=1, initializer_range=0.3, **more),
    "bert": lambda **more: transformers.BertConfig(**SIZES, initializer_range=0.3, **more),
    "roberta": lambda **more: transformers.RobertaConfig(
        **SIZES, initializer_range=0.3, max_position_embeddings=40, **more
    ),
}
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
}
MODEL = transformers.AutoModelForSequenceClassification
# The model, what its base is saved as, whether that knows the labels' names.
KINDS = {
    "a decoder without a head": ("llama", transformers.AutoModelForCausalLM, False),
    "a decoder with another head": ("llama", MODEL, False),
    "an encoder that knows its labels": ("bert", MODEL, True),
    "an encoder with a head of two layers": ("roberta", transformers.AutoModelForMaskedLM, False),
}


def make(folder: Path, family: str, kind: Any = MODEL, named: bool = True, labels: int = 3, **more: Any) -> None:
    """`base` and `adapter`, whose head has `labels` labels."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(NAMES[:labels]))} if named else {"num_labels": 2}
    kind.from_config(CONFIGS[family](**names, **more)).save_pretrained(folder / "base")
    save_tokenizer(folder / "base", end="" if family == "llama" else "</s>")
    base = MODEL.from_pretrained(folder / "base", num_labels=labels, ignore_mismatched_sizes=True)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=TARGETS[family], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder / "adapter")


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, bool]:
    folder = tmp_path_factory.mktemp("classifier")
    family, kind, named = KINDS[request.param]
    make(folder, family, kind, named)
    return folder, family, named


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make(tmp_path, "llama")
    write(tmp_path / "data.jsonl")
    return tmp_path


def write(path: Path, prompts: Sequence[str] = PROMPTS, labels: Sequence[Any] = tuple(LABELS)) -> None:
    lines = [json.dumps({"prompt": p, "label": label}) for p, label in zip(prompts, labels, strict=True)]
    path.write_text("\n".join(lines))


def blk(command: str, *options: str, data: str = "data.jsonl") -> int:
    return main([command, "adapter", data, "--device", "cpu", *options])


def error_of(capsys: Any, command: str, *options: str, **more: Any) -> str:
    capsys.readouterr()
    assert blk(command, *options, **more) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return str(err)


def padded(prompts: Sequence[str], family: str, pad: int) -> dict[str, torch.Tensor]:
    end = [] if family == "llama" else [2]
    rows = [torch.tensor([1, *(WORDS.index(word) for word in prompt.split()), *end]) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def by_hand(folder: Path, family: str, pad: int = 0, labels: int = 3, **arguments: Any) -> LaplaceLoRA:
    base = MODEL.from_pretrained(folder / "base", num_labels=labels, ignore_mismatched_sizes=True)
    base.config.pad_token_id = pad
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    laplace = LaplaceLoRA(model, **arguments)
    batch = {**padded(PROMPTS, family, pad), "labels": torch.tensor(LABELS)}
    return laplace.fit([batch], progress=False).optimize_prior_precision()


def test_the_commands_agree_with_the_class(
    made: tuple[Path, str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, family, named = made
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    names = NAMES if named else ["LABEL_0", "LABEL_1", "LABEL_2"]
    write(tmp_path / "data.jsonl", labels=[names[label] for label in LABELS])
    write(tmp_path / "indices.jsonl")
    pad = 1 if family == "roberta" else 0  # whose configuration says so
    truth = by_hand(folder, family, pad)
    capsys.readouterr()
    assert blk("fit", "--json", "fit.json", "--batch-size", "4") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"labels           {', '.join(map(repr, names))}\n" in out
    result = json.loads(Path("fit.json").read_text())
    assert (result["task"], result["choices"], result["class_token_ids"]) == ("labels", names, None)
    assert result["n_modules"] == len(truth.layers) == (10 if family == "roberta" else 9)
    assert result["log_likelihood"] == pytest.approx(truth.log_likelihood, rel=1e-5)
    assert result["log_marginal_likelihood"] == pytest.approx(float(truth.log_marginal_likelihood()), rel=1e-4)

    logits = truth.predict(padded(PROMPTS, family, pad), differences=True)
    assert blk("predict", "--json", "p.jsonl", "--batch-size", "2", "--uncalibrated") == 0
    check_prediction("p.jsonl", logits)
    rows = read_lines("p.jsonl")
    assert [row["label"] for row in rows] == [names[label] for label in LABELS]
    assert list(rows[0]["laplace"]) == names

    capsys.readouterr()
    assert blk("evaluate", "--json", "e.json", data="indices.jsonl") == 0
    hint = capsys.readouterr().err
    assert hint.rstrip().endswith("blk calibrate adapter HELDOUT.jsonl")
    result = json.loads(Path("e.json").read_text())
    nll = negative_log_likelihood(logits.probs("pairwise"), torch.tensor(LABELS))
    assert result["laplace"]["nll"] == pytest.approx(nll, abs=1e-4)

    assert blk("calibrate", *(["--choices", *names] if named else [])) == 0
    truth.calibrate([{**padded(PROMPTS, family, pad), "labels": torch.tensor(LABELS)}], progress=False)
    assert blk("predict", "--json", "p.jsonl") == 0
    check_prediction("p.jsonl", truth.predict(padded(PROMPTS, family, pad), differences=True))


@pytest.mark.parametrize(("token", "end"), [("<unk>", ""), ("</s>", ""), ("</s>", "</s>"), (None, "</s>")])
def test_the_pad_token_of_a_decoder(llama: Path, token: str | None, end: str) -> None:
    """Its last token is found by it; also where there is none, or a text ends in it, as in training."""
    save_tokenizer(llama / "adapter", end=end)
    path = llama / "adapter" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    if token is not None:
        path.write_text(json.dumps({**content, "pad_token": token}))
    assert blk("fit", "--batch-size", "6") == 0
    assert blk("predict", "--json", "p.jsonl", "--batch-size", "6") == 0
    base = MODEL.from_pretrained("base", num_labels=3)
    model = peft.PeftModel.from_pretrained(base, "adapter").eval()
    tail = [2] if end else []
    for prompt, row in zip(PROMPTS, read_lines("p.jsonl"), strict=True):
        ids = [1, *(WORDS.index(word) for word in prompt.split()), *tail]
        if end and token == end:
            ids = ids[:-1]  # the model itself takes it for padding
        logits = model(input_ids=torch.tensor([ids])).logits  # of the last position, as it knows no padding
        expected = logits.detach().softmax(dim=1)[0]
        torch.testing.assert_close(torch.tensor([*row["map"].values()]), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_is_truncated_as_the_tokenizer_does(llama: Path, capsys: Any, side: str) -> None:
    save_tokenizer(llama / "adapter", end="</s>")
    path = llama / "adapter" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": side}))
    assert blk("fit") == 0
    long, short = "red blue tree", "red blue" if side == "right" else "blue tree"
    for name, prompt in (("long", long), ("short", short)):
        write(Path(f"{name}.jsonl"), [prompt], [0])
        assert blk("predict", "--max-length", "4", "--json", name, data=f"{name}.jsonl") == 0
    assert read_lines("long") == read_lines("short")
    lost = "end" if side == "right" else "beginning"
    assert f"1 of 1 prompts are longer than 4 tokens and lost their {lost} (--max-length)" in capsys.readouterr().err
    assert "--max-length: expected more than 2" in error_of(capsys, "predict", "--max-length", "2")


def test_names_in_the_adapters_folder(llama: Path, capsys: Any) -> None:
    mine = {"id2label": {"2": "z", "0": "x", "1": "y"}}
    Path("adapter/config.json").write_text(json.dumps(mine))
    write(Path("data.jsonl"), labels=["x", "y", "z", "y", "x", "z"])
    assert blk("fit") == 0
    assert "'x', 'y', 'z'" in capsys.readouterr().out
    assert "is not among the choices 'x', 'y', 'z'" in error_of(
        capsys, "fit", data=bad('{"prompt": "red", "label": "bad"}')
    )
    Path("adapter/config.json").write_text(json.dumps({"id2label": {"0": "x", "1": "y"}}))  # of another model
    assert "among the choices 'LABEL_0', 'LABEL_1', 'LABEL_2'" in error_of(capsys, "fit")


def bad(text: str) -> str:
    Path("bad.jsonl").write_text(text)
    return "bad.jsonl"


def test_bad_input(llama: Path, capsys: Any) -> None:
    message = error_of(capsys, "fit", "--choices", "good", "bad", "fair")
    assert message == (
        "blk fit: --choices: leave them out; adapter is a classifier with the labels 'bad' 'fair' 'good', got 'good' "
        "'bad' 'fair'\n"
    )
    assert "label 3 is not among the choices 'bad', 'fair', 'good'" in error_of(
        capsys, "fit", data=bad('{"prompt": "red", "label": 3}')
    )
    assert 'label "A" is not among' in error_of(capsys, "fit", data=bad('{"prompt": "red", "label": "A"}'))
    assert 'no "label"' in error_of(capsys, "fit", data=bad('{"prompt": "red"}'))
    one = bad('{"prompt": "red", "label": 1}\n{"prompt": "blue", "label": 1}')
    assert blk("fit") == 0
    assert "expected labels of at least 2 of the choices, all 2 are 'fair'" in error_of(capsys, "calibrate", data=one)
    path = Path("adapter/laplace.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "custom_forward": True}))
    assert "adapter: its posterior was not fitted to labels by blk fit; run it again" in error_of(capsys, "predict")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    assert "its problem_type is multi_label_classification" in error_of(capsys, "fit")


def test_a_head_that_is_saved_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """PEFT saves the classifier, but no pooler, which a masked language model has not; loading makes random numbers."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data.jsonl")
    make(tmp_path, "bert", transformers.AutoModelForMaskedLM, named=False)
    message = error_of(capsys, "fit")
    assert "2 weights of the classifier, such as bert.pooler.dense.bias, are neither in the base model " in message
    assert "train with their module in modules_to_save" in message
    MODEL.from_pretrained("base", num_labels=2).save_pretrained("whole")
    save_tokenizer(tmp_path / "whole")
    assert blk("fit", "--base", "whole") == 0


def test_an_adapter_that_lost_its_head(llama: Path, capsys: Any) -> None:
    name = "adapter/adapter_model.safetensors"
    tensors = safetensors_load(name)
    safetensors_save({key: value for key, value in tensors.items() if "score" not in key}, name)
    message = error_of(capsys, "fit")
    assert "score" in message
    assert message.startswith("blk fit: ")


def test_a_base_that_cannot_classify(llama: Path, capsys: Any) -> None:
    make_t5 = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.ViTModel(make_t5).save_pretrained("other")
    save_tokenizer(llama / "other")
    assert "base model other: cannot be loaded: Unrecognized configuration class" in error_of(
        capsys, "fit", "--base", "other"
    )
    assert "other/config.json" not in error_of(capsys, "fit", "--base", "./nowhere")


def test_score_is_for_language_models(llama: Path, capsys: Any) -> None:
    assert main(["score", "adapter", "data.jsonl"]) == 2
    assert "expected an adapter of a causal language model, this one is for SEQ_CLS" in capsys.readouterr().err


def test_doctor(llama: Path, capsys: Any) -> None:
    assert main(["doctor", "--adapter", "adapter", "--data", "data.jsonl", "--json", "d.json"]) == 0
    assert json.loads(Path("d.json").read_text())["model"]["ok"]
    assert "Jacobians against autograd" in capsys.readouterr().out
