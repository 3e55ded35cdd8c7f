"""The commands on reward models: pairs against the class itself, and against the formula of Bradley and Terry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from test_commands import WORDS, read_lines
from test_commands_chat import TEMPLATE, set_template
from test_commands_classifier import MODEL, bad, blk, error_of, make

from bayesian_lora_kernels import LaplaceLoRA, calibration
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.commands.job import Job

PAIRS = [
    ("red fish", " bird", " tree tree"),
    ("blue", " bird tree fish", " green"),
    ("green red", " tree", " bird"),
    ("", "fish", "red red bird"),
    ("tree", " blue blue", " fish"),
    ("bird fish", " green", " red"),
    ("fish", " bird", " red tree"),
    ("red", " fish green", " blue"),
    ("blue tree", " red", " fish"),
    ("bird", " tree tree tree", " green red"),
    ("green", " bird", " blue fish"),
]
Sequences = Sequence[Sequence[int]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    make(folder, "llama", transformers.AutoModelForCausalLM, named=False, labels=1)
    write(folder / "data.jsonl")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    shutil.copy(made / "data.jsonl", tmp_path / "data.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, pairs: Sequence[tuple[str, str, str]] = PAIRS) -> None:
    rows = [{"prompt": p, "chosen": c, "rejected": r} if p else {"chosen": c, "rejected": r} for p, c, r in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ids_of(text: str) -> list[int]:
    return [1, *(WORDS.index(word) for word in text.split())]


def sides() -> tuple[Sequences, Sequences]:
    return [ids_of(p + c) for p, c, _ in PAIRS], [ids_of(p + r) for p, _, r in PAIRS]


def padded(sequences: Sequences) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(row) for row in sequences]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def reward_model(made: Path) -> Any:
    base = MODEL.from_pretrained(made / "base", num_labels=1)
    base.config.pad_token_id = 0
    return peft.PeftModel.from_pretrained(base, made / "adapter", is_trainable=True).eval()


def one_call(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Both sides below each other: another forward than the commands have."""
    ids, mask = (torch.cat([batch[f"{key}_{side}"] for side in "ab"]) for key in ("input_ids", "attention_mask"))
    return model(input_ids=ids, attention_mask=mask).logits.view(2, -1).T


def by_hand(made: Path) -> tuple[LaplaceLoRA, dict[str, torch.Tensor]]:
    """Fitted, and the batch of all pairs."""
    chosen, rejected = sides()
    batch = {"labels": torch.zeros(len(PAIRS), dtype=torch.long)}
    for key, rows in padded([*chosen, *rejected]).items():
        batch[f"{key}_a"], batch[f"{key}_b"] = rows.chunk(2)
    laplace = LaplaceLoRA(reward_model(made), forward=one_call).fit([batch], progress=False)
    return laplace.optimize_prior_precision(), batch


def values(path: str, key: str) -> torch.Tensor:
    return torch.tensor([list(row[key].values()) for row in read_lines(path)])


def test_the_commands_agree_with_the_class(made: Path, place: Path, capsys: Any) -> None:
    truth, batch = by_hand(made)
    capsys.readouterr()
    assert blk("fit", "--json", "fit.json", "--batch-size", "4") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "pairs            'chosen', 'rejected'\n" in out
    result = json.loads(Path("fit.json").read_text())
    assert (result["task"], result["choices"], result["class_tokens"]) == ("pairs", ["chosen", "rejected"], None)
    with torch.no_grad():
        chosen, rejected = (
            torch.cat([truth.model(input_ids=torch.tensor([ids])).logits for ids in s]) for s in sides()
        )
    bradley_terry = torch.nn.functional.logsigmoid(chosen - rejected).sum()
    assert result["log_likelihood"] == pytest.approx(float(bradley_terry), rel=1e-4)
    assert result["log_marginal_likelihood"] == pytest.approx(float(truth.log_marginal_likelihood()), rel=1e-4)

    logits = truth.predict(batch)
    for step in ("uncalibrated", "calibrated"):
        for size in ("2", "11"):
            assert blk("predict", "--json", "p.jsonl", "--batch-size", size) == 0
        rows = read_lines("p.jsonl")
        assert [row["line"] for row in rows] == [*range(1, len(PAIRS) + 1)]
        torch.testing.assert_close(values("p.jsonl", "score"), logits.mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values("p.jsonl", "score_std"), logits.variance.sqrt(), atol=1e-5, rtol=1e-3)
        c = logits.covariance
        difference = torch.stack(
            [logits.mean[:, 0] - logits.mean[:, 1], (c[:, 0, 0] + c[:, 1, 1] - 2 * c[:, 0, 1]).sqrt()], dim=1
        )
        torch.testing.assert_close(values("p.jsonl", "difference"), difference, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(values("p.jsonl", "map")[:, :1], (chosen - rejected).sigmoid(), atol=1e-5, rtol=1e-4)
        probs = truth.predict(batch, differences=True).probs("pairwise")
        torch.testing.assert_close(values("p.jsonl", "laplace"), probs, atol=1e-4, rtol=1e-3)
        better = ["chosen" if p > 0.5 else "rejected" for p in probs[:, 0]]
        assert [row["prediction"] for row in rows] == better
        assert set(better) == {"chosen", "rejected"}

        assert blk("evaluate", "--json", "e.json", "--plot", "d.svg", "--plot-risk", "r.svg") == 0
        assert f"{len(PAIRS)} pairs of data.jsonl" in capsys.readouterr().out
        found, zeros = json.loads(Path("e.json").read_text()), torch.zeros(len(PAIRS), dtype=torch.long)
        assert found["map"]["accuracy"] == pytest.approx(float((chosen > rejected).double().mean()))
        assert found["laplace"]["accuracy"] == pytest.approx(better.count("chosen") / len(PAIRS))
        for name, metric in (
            ("nll", calibration.negative_log_likelihood),
            ("ece", calibration.expected_calibration_error),
            ("brier", calibration.brier_score),
            ("error_auroc", calibration.error_auroc),
        ):
            assert found["laplace"][name] == pytest.approx(metric(probs, zeros), abs=1e-4)
        if step == "uncalibrated":
            assert blk("calibrate", "--json", "c.json") == 0
            assert f"pairs                  {len(PAIRS)} of data.jsonl" in capsys.readouterr().out
            # The side that was chosen is anywhere: what the labels say does not depend on it.
            turned = {key: rows.clone() for key, rows in batch.items()}
            for i in (0, 3, 4, 9):
                turned["labels"][i] = 1
                for key in ("input_ids", "attention_mask"):
                    turned[f"{key}_a"][i], turned[f"{key}_b"][i] = batch[f"{key}_b"][i], batch[f"{key}_a"][i]
            truth.calibrate([turned], progress=False)
            assert truth.calibration is not None
            points = json.loads(Path("c.json").read_text())["effective_points"]
            assert points == pytest.approx(truth.calibration.effective_points, rel=1e-3)


def test_the_table(place: Path, capsys: Any) -> None:
    assert blk("fit") == 0
    capsys.readouterr()
    assert blk("predict", "--json", "p.jsonl", "--uncalibrated") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == ["", "score of", "score of", "", "", "Laplace (pairwise,"]
    assert [cell.strip() for cell in lines[1].split("|")] == [
        "", "chosen", "rejected", "difference", "MAP", "uncalibrated)"
    ]  # fmt: skip
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1
    row = read_lines("p.jsonl")[4]
    numbers = [*row["difference"].values(), row["map"]["chosen"], row["laplace"]["chosen"]]
    assert lines[7].split("|")[0].split() == ["5", row["prediction"]]
    assert " ".join(lines[7].split("|")[3:]).split() == [f"{number:.3f}" for number in numbers]


def test_a_tie_is_half_right(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives every text the same score ranks nothing."""
    write(Path("data.jsonl"), PAIRS[:10])
    assert blk("fit") == 0

    predict = Job.predict

    def same(job: Job, laplace: LaplaceLoRA) -> Any:
        found = predict(job, laplace)
        return replace(found, mean=torch.zeros_like(found.mean))

    monkeypatch.setattr(Job, "predict", same)
    assert blk("evaluate", "--json", "e.json") == 0
    assert json.loads(Path("e.json").read_text())["map"]["accuracy"] == 0.5


def test_the_class_reads_what_the_commands_write(made: Path, place: Path) -> None:
    assert blk("fit") == 0
    assert blk("predict", "--json", "p.jsonl", "--uncalibrated") == 0
    found = LaplaceLoRA.from_pretrained(reward_model(made), place / "adapter", forward=one_call)
    _, batch = by_hand(made)
    torch.testing.assert_close(
        found.predict(batch).variance.sqrt(), values("p.jsonl", "score_std"), atol=1e-5, rtol=1e-3
    )


def test_chats_are_what_the_template_says(place: Path) -> None:
    set_template(place / "adapter", TEMPLATE)
    turn = [{"role": "user", "content": "red fish"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("bird", "tree tree")]
    lines = [
        {"prompt": turn, "chosen": answers[0], "rejected": answers[1]},
        {"chosen": turn + answers[0], "rejected": turn + answers[1]},
    ]
    Path("chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(Path("text.jsonl"), [("red red fish", " </s> blue bird </s>", " </s> blue tree tree </s>")])
    assert blk("fit") == 0
    for name in ("chat", "text"):
        assert blk("predict", "--json", name, data=f"{name}.jsonl") == 0
    one, other = read_lines("chat")
    (text,) = read_lines("text")
    for key in ("score", "score_std", "difference", "laplace"):
        assert one[key] == pytest.approx(other[key], rel=1e-4)
        assert one[key] == pytest.approx(text[key], rel=1e-4)


def test_bad_data(place: Path, capsys: Any) -> None:
    turn = [{"role": "user", "content": "red"}]
    for line, message in (
        ('{"prompt": "red", "label": 1}', ':1: no "chosen"; this model gives a text one score'),
        ('{"chosen": "red"}', ':1: no "rejected"'),
        ('["red", "blue"]', 'expected an object {"chosen": ..., "rejected": ...}'),
        ('{"chosen": "red", "rejected": 3}', '"rejected": expected text, or a list of messages, got 3'),
        ('{"chosen": "red", "rejected": null}', '"rejected": expected text, or a list of messages, got null'),
        ('{"prompt": 1, "chosen": "red", "rejected": "blue"}', '"prompt": expected text, or a list'),
        ('{"chosen": [], "rejected": []}', '"chosen": expected a list of messages'),
        (json.dumps({"chosen": turn, "rejected": [{"role": "user"}]}), '"rejected": expected a list of messages'),
        (
            json.dumps({"prompt": "red", "chosen": turn, "rejected": turn}),
            'expected texts only, or lists of messages only; "prompt" is text and "chosen" is a list and',
        ),
        ('{"chosen": "red", "rejected": "red "}', ":1: chosen and rejected are the same, expected two answers"),
        (json.dumps({"chosen": turn, "rejected": turn}), ":1: these are messages, and the tokenizer has no chat"),
    ):
        assert message in error_of(capsys, "fit", data=bad(line)), line
    write(Path("long.jsonl"), [("red red red", " bird", " fish")])
    message = error_of(capsys, "fit", "--max-length", "4", data="long.jsonl")
    assert ":1: chosen and rejected are the same within 4 tokens (--max-length)" in message


def test_bad_use(made: Path, place: Path, capsys: Any) -> None:
    message = error_of(capsys, "fit", "--choices", "A", "B")
    assert "adapter is a reward model, which chooses between 'chosen' 'rejected', got 'A' 'B'" in message
    assert blk("fit", "--choices", "chosen", "rejected") == 0
    write(Path("one.jsonl"), PAIRS[:1])
    assert "one.jsonl: expected at least 2 pairs, got 1" in error_of(capsys, "calibrate", data="one.jsonl")
    assert blk("evaluate", data="one.jsonl") == 0
    LaplaceLoRA(reward_model(made), likelihood="regression").fit(
        [{**padded(sides()[0]), "labels": torch.zeros(len(PAIRS))}], progress=False
    ).save_pretrained("other")
    message = error_of(capsys, "predict", "--posterior", "other")
    assert "other: its posterior was not fitted to pairs by blk fit; run it again" in message


def test_long_pairs(place: Path, capsys: Any) -> None:
    write(Path("long.jsonl"), [("red", " bird fish fish", " fish")])
    assert blk("fit", "--max-length", "4", data="long.jsonl") == 0
    assert "1 of 1 pairs are longer than 4 tokens and lost their end" in capsys.readouterr().err


def test_doctor(place: Path, capsys: Any) -> None:
    assert main(["doctor", "--adapter", "adapter", "--data", "data.jsonl", "--json", "d.json"]) == 0
    found = json.loads(Path("d.json").read_text())["model"]
    assert found["ok"]
    assert sum(one["error"] is not None for one in found["agreements"]) >= 3
