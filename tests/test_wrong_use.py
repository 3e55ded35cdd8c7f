"""Wrong use of every command: one line that says what and where, exit code 2, nothing on stdout, no file touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_commands
import transformers
from safetensors.torch import load_file, save_file
from test_commands import CHOICES, LABELS, PROMPTS, save_tokenizer

from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.commands import predict

made = test_commands.made
JOB = ["--choices", *CHOICES]
FILES = {
    "fit": ["data.jsonl"],
    "calibrate": ["held.jsonl"],
    "evaluate": ["test.jsonl"],
    "compare": ["data.jsonl", "held.jsonl", "test.jsonl"],
    "predict": ["data.jsonl"],
    "influence": ["data.jsonl", "test.jsonl"],
    "score": ["text.txt"],
    "doctor": ["data.jsonl"],
}
LABELLED = ("fit", "calibrate", "evaluate", "compare", "influence")
JSONL = (*LABELLED, "predict")
FITTED = ("calibrate", "evaluate", "predict", "score", "influence")
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a posterior, and data of twenty lines."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(made / "adapter", folder / "adapter")
    for name in ("data", "held", "test"):
        rows = [{"prompt": PROMPTS[i % 6], "label": CHOICES[LABELS[i % 6]]} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("red fish\nAnswer : A")
    assert main(["fit", str(folder / "adapter"), str(folder / "data.jsonl"), *JOB, "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, the working directory."""
    shutil.copytree(whole, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


class Call(NamedTuple):
    """A command line, the last of whose files may be another."""

    command: str
    file: str = ""
    options: Sequence[str] = ()

    def words(self) -> list[str]:
        *others, last = FILES[self.command]
        files = [*others, self.file or last]
        if self.command == "doctor":
            return ["doctor", "--adapter", "adapter", "--data", *files, *self.options]
        choices = [] if self.command == "score" or "--choices" in self.options else JOB
        return [self.command, "adapter", *files, *choices, *self.options]


class Wrong(NamedTuple):
    """What is wrong: for which commands, in which file or by which options, done by what, and what is said of it."""

    commands: Sequence[str]
    said: str
    file: str = ""
    options: Sequence[str] = ()
    prepare: Callable[[Path], Any] = lambda file: None


def line_17(text: str | bytes) -> Callable[[Path], Any]:
    def replace(file: Path) -> None:
        lines = file.read_bytes().splitlines()
        lines[16] = text if isinstance(text, bytes) else text.encode()
        file.write_bytes(b"\n".join(lines))

    return replace


def content(data: bytes) -> Callable[[Path], Any]:
    return lambda file: file.write_bytes(data)


def cut(name: str) -> Callable[[Path], Any]:
    def shorten(_: Path) -> None:
        (path,) = Path().glob(name)
        path.write_bytes(path.read_bytes()[:-9])

    return shorten


def other_weights(_: Path) -> None:
    tensors = {name: 2 * tensor for name, tensor in load_file(ADAPTER).items()}
    save_file(tensors, ADAPTER, metadata={"format": "pt"})


def other_base(_: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=14, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained("other")
    save_tokenizer(Path("other"))


def broken_config(_: Path) -> None:
    Path("adapter/adapter_config.json").write_text('{"r": 3,')


ALL = tuple(FILES)
WRONG = {
    "a missing file": Wrong(ALL, "gone: no such file", "gone"),
    "a folder for a file": Wrong(ALL, "adapter: expected a ", "adapter"),
    "a file for a folder": Wrong(ALL, "text.txt/x: cannot be read: Not a directory", "text.txt/x"),
    "an empty file": Wrong(JSONL, "{file}: no examples", prepare=content(b"\n\n")),
    "an empty text": Wrong(("score",), "text.txt: it has no tokens", prepare=content(b"")),
    "another encoding": Wrong(ALL, "{file}:1: not UTF-8 text: byte 0xff", prepare=content("red".encode("utf-16"))),
    "a byte that is no text": Wrong(JSONL, "{file}:17: not UTF-8", prepare=line_17(b'{"prompt": "\xe9", "label": 0}')),
    "a broken line": Wrong(
        JSONL, "{file}:17: not JSON: Expecting value at column 27", prepare=line_17('{"prompt": "red", "label":')
    ),
    "a deep line": Wrong(JSONL, "{file}:17: not JSON that can be read", prepare=line_17("[" * 10**5)),
    "a long number": Wrong(JSONL, "{file}:17: not JSON that can be read", prepare=line_17("1" * 9999)),
    "a wrong column": Wrong(JSONL, '{file}:17: no "prompt"', prepare=line_17('{"question": "red", "label": "A"}')),
    "no label": Wrong(LABELLED, '{file}:17: no "label"', prepare=line_17('{"prompt": "red"}')),
    "a label out of range": Wrong(
        LABELLED, "{file}:17: label 3 is not", prepare=line_17('{"prompt": "red", "label": 3}')
    ),
    "an unknown choice": Wrong(
        JSONL, '{file}:17: label "D" is not among', prepare=line_17('{"prompt": "", "label": "D"}')
    ),
    "messages": Wrong(
        JSONL,
        "{file}:17: these are messages",
        prepare=line_17('{"messages": [{"role": "user", "content": "red"}], "label": 0}'),
    ),
    "a choice twice": Wrong(JSONL, "--choices: 'A' is there twice", options=["--choices", "A", "B", "A"]),
    "a choice that is no token": Wrong(
        JSONL, "'zebra' is not in this model's vocabulary", options=["--choices", *CHOICES, "zebra"]
    ),
    "a type that is none": Wrong(ALL, "argument --dtype: invalid choice: 'float99'", options=["--dtype", "float99"]),
    "a device that is none": Wrong(
        ALL, "--device nowhere: not usable on this machine; expected such as cpu", options=["--device", "nowhere"]
    ),
    "a device without numbers": Wrong(ALL, "--device meta: not usable", options=["--device", "meta"]),
    "no adapter": Wrong(ALL, "adapter: no such folder", prepare=lambda _: shutil.rmtree("adapter")),
    "a broken configuration": Wrong(ALL, "adapter/adapter_config.json: cannot be read", prepare=broken_config),
    "a truncated adapter": Wrong(ALL, "adapter adapter: cannot be loaded", prepare=cut(ADAPTER)),
    "an adapter of another model": Wrong(
        (*JSONL, "score"), "adapter does not fit the base model other", options=["--base", "other"], prepare=other_base
    ),
    "no posterior": Wrong(
        FITTED, "base: no such folder; expected a folder that blk fit wrote into", options=["--posterior", "base"]
    ),
    "a truncated posterior": Wrong(FITTED, ": damaged", prepare=cut("adapter/laplace-*.safetensors")),
    "a posterior of another adapter": Wrong(
        FITTED, "weights are not those the posterior was fitted to", prepare=other_weights
    ),
    "JSON into a folder": Wrong(
        ALL, "--json adapter: expected a file, this is a folder", options=["--json", "adapter"]
    ),
    "JSON into no folder": Wrong(
        ALL, "--json no/x.json: the folder no does not exist", options=["--json", "no/x.json"]
    ),
    "JSON below a file": Wrong(
        ALL, "--json text.txt/x: the folder text.txt is a file", options=["--json", "text.txt/x"]
    ),
    "JSON over the data": Wrong(("fit", "predict"), "this is the file of examples", options=["--json", "data.jsonl"]),
    "JSON over a posterior": Wrong(
        ALL,
        "--json adapter/laplace.json: this is a file of a model or a posterior",
        options=["--json", "adapter/laplace.json"],
    ),
    "JSON into a pipe": Wrong(
        ALL,
        "--json pipe: expected a file, this is a device or a pipe",
        options=["--json", "pipe"],
        prepare=lambda _: os.mkfifo("pipe"),
    ),
    "JSON nowhere": Wrong(ALL, "argument --json: expected a path", options=["--json", ""]),
    "a picture of no kind": Wrong(
        ("evaluate", "compare", "score"), "--plot x.txt: expected a name that ends in", options=["--plot", "x.txt"]
    ),
    "a posterior below a file": Wrong(("fit",), "--out text.txt/x: ", options=["--out", "text.txt/x"]),
    "a checkpoint below a file": Wrong(("fit",), "--checkpoint text.txt/x: ", options=["--checkpoint", "text.txt/x"]),
}
if sys.platform == "linux":  # root may write into a folder that is read-only, but not there
    WRONG["JSON where nobody writes"] = Wrong(
        ALL, "--json /proc/x.json: the folder /proc cannot be written to", options=["--json", "/proc/x.json"]
    )
CASES = [(name, command) for name, wrong in WRONG.items() for command in wrong.commands]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refusal(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a command line, in one line, with exit code 2; nothing has changed."""
    before = tree(Path())
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"blk {words[0]}: ")
    assert tree(Path()) == before
    return err


@pytest.mark.parametrize(("name", "command"), CASES)
def test_it_is_refused(place: Path, capsys: pytest.CaptureFixture[str], name: str, command: str) -> None:
    wrong = WRONG[name]
    call = Call(command, wrong.file, wrong.options)
    file = wrong.file or FILES[command][-1]
    wrong.prepare(Path(file))
    assert wrong.said.replace("{file}", file) in refusal(call.words(), capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect", "gone"], "gone: no such folder; expected a folder that blk fit wrote into"),
        (["inspect", "text.txt"], "text.txt: a file; expected a folder that blk fit wrote into"),
        (["inspect", "adapter", "--plot", "no/x.png"], "--plot no/x.png: the folder no does not exist"),
        (["inspect", "adapter", "--json", "adapter/laplace.json"], "this is a file of a model or a posterior"),
        (["fit", "adapter", "data.jsonl", *JOB, "--json", "laplace.json"], "this is a file of a model or a posterior"),
        (["bench", "--device", "nowhere"], "--device nowhere: not usable"),
        (["bench", "--dtype", "float99"], "argument --dtype: invalid choice"),
        (["bench", "--json", "no/x"], "--json no/x: the folder no does not exist"),
        (["demo", "--out", "text.txt"], "--out text.txt: text.txt is a file, expected a folder"),
        (["demo", "--model", "x", "--cache", "text.txt"], "--cache text.txt: text.txt is a file"),
        (["demo", "--data", "data.jsonl"], "--data: not for the tiny model"),
        (["demo", "--model", "base"], "vaderSentiment-3.3.2.tar.gz: no such file"),
        (["demo", "--model", "base", "--data", "data.jsonl"], "--choices: expected the answers that labels of"),
        (["demo", "--model", "x", "--data", "gone.jsonl", *JOB], "gone.jsonl: no such file"),
        (["demo", "--model", "x", "--data", "data.jsonl", *JOB], "data.jsonl: expected at least 60 lines"),
        (["doctor", "--data", "data.jsonl"], "--data: expected with --adapter FOLDER"),
        (["doctor", "--adapter", "adapter"], "--data: expected a file of JSON lines"),
        (
            ["influence", "adapter", "data.jsonl", "test.jsonl", *JOB, "--json", "test.jsonl"],
            "this is the file of queries",
        ),
        (["compare", "adapter", "data.jsonl", "data.jsonl", "test.jsonl", *JOB], "data.jsonl: the same file as"),
        (["compare", "adapter", *FILES["compare"], "--methods", "kfac", "kfac"], "--methods: 'kfac' is there twice"),
    ],
)
def test_of_one_command(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert said in refusal(words, capsys)


def test_a_folder_that_vanishes(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    original = predict._rows

    def rows(*args: Any) -> Any:
        shutil.rmtree("out")
        return original(*args)

    monkeypatch.setattr(predict, "_rows", rows)
    Path("out").mkdir()
    assert main(Call("predict", options=["--json", "out/p.jsonl"]).words()) == 2
    assert "blk predict: --json out/p.jsonl: cannot be written: No such file or directory" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_stdout(place: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bayesian_lora_kernels.cli", "inspect", "adapter"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "blk inspect: stdout: cannot be written: No space left on device\n")
