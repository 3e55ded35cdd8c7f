"""What commands print: plain where there is no terminal, in colours and within its width where there is one."""

from __future__ import annotations

import io
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.parts import Advice, Facts, Groups, Part, Table

CODE = re.compile(r"\x1b\[([\d;]*)m")
COLOUR = re.compile(r"\x1b\[(?:\d+;)*3\d(?:;\d+)*m")

TABLE = Table([["", "", "Laplace (pairwise,"], ["", "MAP", "uncalibrated)"], ["accuracy [red]", "0.5", "0.625"]], 1, 2)
MANY = Table([["", *(f"figure {i}" for i in range(9))], ["temperature scaling", *(f"0.{i}00{i}" for i in range(9))]])
FACTS = Facts([("folder", "adapter"), ("log evidence", "-1117.54; of one precision for all modules the best is 3.582")])
WIDE = Groups(
    [["line", "label"], ["1", "A"], ["20", "B"]],
    [
        ("MAP", ["A", "B", "C"], [["0.100", "0.200", "0.700"], ["0.300", "0.300", "0.400"]]),
        ("Laplace,\ncalibrated", ["A", "B", "C"], [["0.110", "0.210", "0.680"], ["0.310", "0.310", "0.380"]]),
        ("std", ["A", "B", "C"], [["1.000", "2.000", "3.000"], ["4.000", "5.000", "6.000"]]),
    ],
)
PLAIN: dict[str, tuple[Part, str]] = {
    "table": (
        TABLE,
        "                     Laplace (pairwise,\n"
        "                MAP       uncalibrated)\n"
        "accuracy [red]  0.5               0.625\n",
    ),
    "many": (
        MANY,
        f"{'':19}{''.join(f'  figure {i}' for i in range(9))}\n"
        f"temperature scaling{''.join(f'    0.{i}00{i}' for i in range(9))}\n",
    ),
    "facts": (
        FACTS,
        "folder        adapter\nlog evidence  -1117.54; of one precision for all modules the best is 3.582\n",
    ),
    "groups": (
        WIDE,
        "            |                        |        Laplace,        |\n"
        "            |          MAP           |       calibrated       |          std\n"
        "line  label |      A       B       C |      A       B       C |      A       B       C\n"
        "1     A     |  0.100   0.200   0.700 |  0.110   0.210   0.680 |  1.000   2.000   3.000\n"
        "20    B     |  0.300   0.300   0.400 |  0.310   0.310   0.380 |  4.000   5.000   6.000\n",
    ),
    "advice": (Advice("do that", "blk fit [a] :smile:"), "do that: blk fit [a] :smile:\n"),
    "text": ("  pass  all is :+1: [bold]well[/bold] 1 2", "  pass  all is :+1: [bold]well[/bold] 1 2\n"),
}


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, *some: Part, columns: int = 80, terminal: bool = True, **extra: str) -> str:
    """What `blk` writes to stdout."""
    stream = Terminal() if terminal else io.StringIO()
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40", **extra}.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        output.show(Namespace(json=None), *some)
    return stream.getvalue()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_text(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    part, plain = PLAIN[name]
    assert shown(monkeypatch, part, terminal=False) == plain
    assert shown(monkeypatch, part, TERM="dumb") == plain
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rich.console", None)  # importing it raises ImportError
        assert shown(monkeypatch, part) == plain


@pytest.mark.parametrize("name", PLAIN)
def test_a_terminal_has_the_same_words(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("rich")
    part, plain = PLAIN[name]
    styled = shown(monkeypatch, part, columns=120)
    assert CODE.search(styled)
    assert sorted(re.sub("─", "", CODE.sub("", styled)).split()) == sorted(plain.split()), "and nothing is folded"


def test_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    lines = "  pass  one\n  FAIL  two\n  native      cannot run: it is not built"
    assert len(COLOUR.findall(shown(monkeypatch, lines))) == 3
    assert not COLOUR.findall(shown(monkeypatch, lines, NO_COLOR="1"))
    assert not COLOUR.findall(shown(monkeypatch, "400 examples of pass.jsonl, FAIL"))


@pytest.mark.parametrize("columns", [30, 45, 80])
@pytest.mark.parametrize("name", ["table", "many", "facts", "groups"])
def test_narrow_terminals(monkeypatch: pytest.MonkeyPatch, name: str, columns: int) -> None:
    pytest.importorskip("rich")
    part, plain = PLAIN[name]
    text = CODE.sub("", shown(monkeypatch, part, columns=columns))
    assert max(map(len, text.splitlines())) <= columns
    assert set(re.findall(r"\d\.\d+", text)) == set(re.findall(r"\d\.\d+", plain))


def test_what_belongs_to_a_row_stays_on_one_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 rows in three groups on a narrow terminal of 40 lines, each row's groups are at most that far apart."""
    pytest.importorskip("rich")
    numbers = [[f"{i:.3f}"] * 3 for i in range(200)]
    part = Groups(
        [["line"], *([str(i)] for i in range(200))], [(title, ["A", "B", "C"], numbers) for title in ("x", "y", "z")]
    )
    lines = CODE.sub("", shown(monkeypatch, part, columns=40)).splitlines()
    for i in range(200):
        places = [at for at, line in enumerate(lines) if line.split(" ")[0] == str(i)]
        assert len(places) == 3
        assert places[-1] - places[0] < 40


def test_a_message_is_one_line_whatever_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    output.warn("a message that is longer than twenty columns [red] :smile:")
    text = stream.getvalue()
    assert COLOUR.search(text)
    assert CODE.sub("", text) == "warning: a message that is longer than twenty columns [red] :smile:\n"


def test_json_on_stdout_has_it_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(json=Path("-"))
    output.show(args, "to read", TABLE)
    output.write_json(args.json, {"x": float("nan"), "y": [1.5, float("inf")]})
    assert capsys.readouterr().out == '{\n  "x": null,\n  "y": [\n    1.5,\n    null\n  ]\n}\n'
