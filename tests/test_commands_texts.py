"""`blk fit` on whole texts, of which a language model predicts every token, and `blk score` afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import test_commands
import torch
import transformers
from test_commands import WORDS, blk, error_of
from test_commands_chat import TEMPLATE, messages, set_template

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.cli import main

made, place = test_commands.made, test_commands.place

TEXTS = ["red fish blue bird", "green tree", "blue bird tree tree red fish : green", "tree", "fish fish fish"]


def write_texts(texts: list[Any], path: str = "texts.jsonl") -> str:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def fit(*options: str, data: str = "texts.jsonl") -> dict[str, Any]:
    given = ["fit", "adapter", data, "--device", "cpu", "--json", "fit.json", *options]
    assert main(given) == 0
    found: dict[str, Any] = json.loads(Path("fit.json").read_text())
    return found


def refused(capsys: Any, command: str, data: str = "texts.jsonl") -> str:
    """The one line on stderr, without `--choices`."""
    capsys.readouterr()
    assert main([command, "adapter", data, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return str(err)


def model_of(made: Path) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "base")
    return peft.PeftModel.from_pretrained(base, made / "adapter", is_trainable=True).eval()


def rows() -> list[torch.Tensor]:
    return [torch.tensor([[1, *(WORDS.index(word) for word in text.split())]]) for text in TEXTS]


def test_a_fit_is_that_of_the_texts_one_by_one(made: Path, place: Path, capsys: Any) -> None:
    """In batches of three, which are padded, against texts that are not."""
    write_texts(TEXTS)
    result = fit("--fisher", "empirical", "--batch-size", "3")
    printed = capsys.readouterr().out
    model = model_of(made)
    by_hand = LaplaceLoRA(model, fisher="empirical")
    by_hand.fit([{"input_ids": ids, "labels": ids} for ids in rows()], progress=False)
    by_hand.optimize_prior_precision()
    assert (result["task"], result["choices"], result["class_token_ids"]) == ("texts", [], None)
    assert (result["n_examples"], result["n_tokens"]) == (5, 4 + 2 + 8 + 1 + 3)
    assert result["log_marginal_likelihood"] == pytest.approx(float(by_hand.log_marginal_likelihood()), rel=1e-4)
    assert result["prior_precision"] == pytest.approx(float(by_hand.prior_precision), rel=1e-3)

    with torch.no_grad():  # and the likelihood without the library
        log_p = [
            torch.log_softmax(model.double()(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None]) for ids in rows()
        ]
    assert result["log_likelihood"] == pytest.approx(float(torch.cat(log_p).sum()), rel=1e-5)
    assert "18 predicted, each from those before it" in printed
    assert f"({result['log_likelihood'] / 18:.4f} per token)" in printed
    assert "blk score adapter TEXT-FILE" in printed
    assert "blk calibrate" not in printed

    text = "blue fish : bird tree"
    Path("text.txt").write_text(text)
    words = ["score", "adapter", "text.txt", "--device", "cpu", "--samples", "8", "--json", "score.json"]
    assert main(words) == 0
    tokens = json.loads(Path("score.json").read_text())["tokens"]
    ids = torch.tensor([[1, *(WORDS.index(word) for word in text.split())]])
    truth = by_hand.score({"input_ids": ids}, 8, torch.Generator().manual_seed(0))
    for name in ("log_prob_map", "log_prob", "entropy", "mutual_information"):
        found = torch.tensor([token[name] for token in tokens])
        torch.testing.assert_close(found, getattr(truth, name)[0, 1:].float(), atol=1e-4, rtol=1e-3)
    assert max(token["mutual_information"] for token in tokens) > 1e-3


def test_a_chat_is_what_the_template_says(place: Path) -> None:
    set_template(place / "adapter", TEMPLATE)
    Path("chat.jsonl").write_text(json.dumps({"messages": messages(["fish", "bird"])}) + "\n")
    write_texts(["red fish </s> blue bird </s>"])
    found, truth = fit(data="chat.jsonl"), fit()
    assert found["n_tokens"] == truth["n_tokens"] == 6
    assert found["log_likelihood"] == truth["log_likelihood"]
    assert found["log_marginal_likelihood"] == truth["log_marginal_likelihood"]


def test_a_text_that_is_too_long_is_cut(place: Path, capsys: Any) -> None:
    write_texts(TEXTS)
    result = fit("--max-length", "4")
    assert (result["n_truncated"], result["n_tokens"]) == (2, 3 + 2 + 3 + 1 + 3)
    assert "warning: 2 of 5 texts are longer than 4 tokens and lost their end (--max-length)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "red", "label": "A"}',
            'expected "text" or "messages" alone, as prompts and labels need --choices',
        ),
        ('{"messages": [], "label": "A"}', "prompts and labels need --choices"),
        ('{"txt": "red"}', 'no "text" and no "messages"; its keys are "txt"'),
        ('{"text": 3}', '"text": expected text, got 3'),
        ('{"text": ["red"]}', 'the messages of a chat go under "messages"'),
        ('{"text": "red", "messages": []}', 'expected "text" or "messages", got both'),
        ('"red"', 'expected an object {"text": ...}, got "red"'),
        ('{"text": ""}', "the text is a single token, before which there is nothing to predict it from"),
    ],
)
def test_bad_lines_are_named(place: Path, capsys: Any, line: str, message: str) -> None:
    Path("texts.jsonl").write_text(f'{{"text": "red fish"}}\n{line}\n')
    error = refused(capsys, "fit")
    assert ":2: " in error
    assert message in error
    assert not Path("adapter/laplace.json").exists()


def test_the_other_commands_need_choices(place: Path, capsys: Any) -> None:
    write_texts(TEXTS)
    fit()
    for command in ("evaluate", "predict", "calibrate"):
        assert "--choices: expected what the model chooses between" in refused(capsys, command)
    assert "was not fitted with choices; run blk fit with --choices" in error_of(capsys, "predict")
    assert blk("fit") == 0  # which takes its place
    assert blk("predict", "--json", "p.jsonl") == 0
