"""Prompts as messages, and choices of several tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import test_commands
import transformers
from test_commands import LABELS, blk, error_of, read_lines, write_data

from bayesian_lora_kernels.cli import main

made, place, fitted = test_commands.made, test_commands.place, test_commands.fitted

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %} red {% elif message.role == "
    "'assistant' %} blue {% else %}{{ raise_exception('no ' + message.role) }}{% endif %}{{ message.content }} </s>"
    "{% endfor %}{% if add_generation_prompt %} Answer :{% endif %}"
)
CHATS = [
    ["red fish"],
    ["blue", "bird tree", "tree"],
    ["green"],
    ["red red", "blue", "fish bird tree"],
    ["tree"],
    ["fish green blue"],
]
AS_TEXT = [  # without the first <s>, which the tokenizer puts before a text
    "red red fish </s> Answer :",
    "red blue </s> blue bird tree </s> red tree </s> Answer :",
    "red green </s> Answer :",
    "red red red </s> blue blue </s> red fish bird tree </s> Answer :",
    "red tree </s> Answer :",
    "red fish green blue </s> Answer :",
]


def set_template(folder: Path, template: str) -> None:
    """Into a folder that has the tokenizer of `test_commands` or none yet."""
    test_commands.save_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def messages(turns: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def write_chats(path: str, chats: Sequence[Sequence[str]] = CHATS) -> str:
    lines = [{"messages": messages(chat), "label": label} for chat, label in zip(chats, LABELS, strict=False)]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_messages_are_what_the_template_says(place: Path) -> None:
    set_template(place / "adapter", TEMPLATE)
    write_data(Path("text.jsonl"), AS_TEXT)
    found = {}
    for data in (write_chats("chat.jsonl"), "text.jsonl"):
        assert blk("fit", "--json", "fit.json", data=data) == 0
        result = json.loads(Path("fit.json").read_text())
        assert blk("predict", "--json", "p.jsonl", data=data) == 0
        found[data] = result["log_marginal_likelihood"], read_lines("p.jsonl")
    assert found["chat.jsonl"] == found["text.jsonl"]


def test_texts_and_messages_in_one_file(place: Path) -> None:
    set_template(place / "adapter", TEMPLATE)
    assert blk("fit") == 0
    lines = [*Path(write_chats("chat.jsonl")).read_text().splitlines()[:2], json.dumps({"prompt": AS_TEXT[2]})]
    Path("both.jsonl").write_text("\n".join(lines))
    write_data(Path("text.jsonl"), AS_TEXT[:3], LABELS[:2])
    for name in ("both", "text"):
        assert blk("predict", "--json", name, data=f"{name}.jsonl") == 0
    assert read_lines("both") == read_lines("text")


def test_a_long_chat_keeps_its_first_token_and_its_end(place: Path, capsys: Any) -> None:
    set_template(place / "adapter", TEMPLATE)
    assert blk("fit") == 0
    write_chats("long.jsonl", [["fish bird tree"]])
    write_data(Path("short.jsonl"), ["tree </s> Answer :"], LABELS[:1])
    for name in ("long", "short"):
        assert blk("predict", "--max-length", "5", "--json", name, data=f"{name}.jsonl") == 0
    assert "1 of 1 prompts are longer than 5 tokens and lost their beginning" in capsys.readouterr().err
    assert read_lines("long") == read_lines("short")


def test_bad_messages(place: Path, capsys: Any) -> None:
    message = error_of(capsys, "fit", data=write_chats("chat.jsonl"))
    assert message == (
        "blk fit: chat.jsonl:1: these are messages, and the tokenizer has no chat template; write the whole text as "
        "the model was trained on it\n"
    )
    set_template(place / "adapter", TEMPLATE)
    user = {"role": "user", "content": "red"}
    for content, message in (
        ({"messages": [user], "prompt": "red"}, ':1: expected "prompt" or "messages", got both'),
        ({"messages": []}, '"messages": expected a list of messages {"role": ..., "content": ...}, both texts, got []'),
        ({"messages": "red"}, '"messages": expected a list'),
        ({"messages": ["red"]}, '"messages": expected a list'),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, '"messages": expected a list'),
        ({"prompt": [user]}, '"prompt": expected text, got [{"role": "user", "content": "red"}]; the messages of a'),
        ({"messages": [user, {"role": "assistant", "content": "A"}]}, ":1: the last message is the assistant's"),
        (
            {"messages": [{"role": "system", "content": "A"}]},
            "chat template does not take it: TemplateError: no system",
        ),
        ({"text": "red"}, 'no "prompt" and no "messages"; its keys are "text", "label"'),
    ):
        Path("bad.jsonl").write_text(json.dumps({**content, "label": 0}))
        assert message in error_of(capsys, "fit", data="bad.jsonl"), content


def test_choices_of_several_tokens(place: Path, capsys: Any) -> None:
    longer = ["A fish bird", "B", "C tree"]
    assert blk("fit", "--json", "long.json", choices=longer, data=indices()) == 0
    assert capsys.readouterr().err == (
        "warning: --choices: only the first token of a choice counts; 'A fish bird' has 3 tokens and stands for 'A', "
        "'C tree' has 2 tokens and stands for 'C'\n"
    )
    assert blk("fit", "--json", "short.json", data=indices()) == 0
    assert capsys.readouterr().err == ""
    found = [json.loads(Path(name).read_text()) for name in ("long.json", "short.json")]
    assert found[0]["class_tokens"] == found[1]["class_tokens"] == ["A", "B", "C"]
    assert found[0]["log_likelihood"] == found[1]["log_likelihood"]
    message = error_of(capsys, "fit", choices=["A fish", "A bird"], data=indices())
    assert "'A fish' and 'A bird' begin with the same token 'A'; they must differ in the first token, whose" in message


def indices() -> str:
    lines = [json.dumps({"prompt": "red fish Answer :", "label": label}) for label in (0, 1, 0)]
    Path("indices.jsonl").write_text("\n".join(lines))
    return "indices.jsonl"


def test_a_language_model_needs_choices(place: Path, capsys: Any) -> None:
    for command in ("predict", "evaluate", "calibrate"):
        assert main([command, "adapter", "data.jsonl"]) == 2
        assert "--choices: expected what the model chooses between" in capsys.readouterr().err
    assert main(["fit", "adapter", "data.jsonl"]) == 2
    assert ":1: expected" in (error := capsys.readouterr().err)
    assert "prompts and labels need --choices" in error


@pytest.mark.parametrize("command", ["fit", "calibrate", "evaluate", "predict"])
def test_help(capsys: Any, command: str) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        '"messages", a chat',
        '"chosen": ..., "rejected": ...',
        "a classifier or reward model knows by itself",
    ):
        assert text in shown
