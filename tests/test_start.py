"""What is imported when: PyTorch takes a second, which neither `blk --help` nor a wrong option need wait for."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import bayesian_lora_kernels as blk
from bayesian_lora_kernels.commands import options
from bayesian_lora_kernels.commands.parser import SHELLS, build_parser
from bayesian_lora_kernels.curvature import CURVATURES
from bayesian_lora_kernels.predictive.calibrate import METHODS
from bayesian_lora_kernels.predictive.distribution import PROBABILITY_METHODS

COMMANDS = (
    "demo",
    "doctor",
    "bench",
    "fit",
    "calibrate",
    "evaluate",
    "compare",
    "predict",
    "score",
    "influence",
    "inspect",
)
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "numpy")))  # importing one raises ImportError
from bayesian_lora_kernels.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *[([command, "--help"], 0) for command in COMMANDS],
        (["fit"], 2),
        (["fit", "a", "b", "--rank", "many"], 2),
        (["fit", "a", "b", "--curvature", "flat"], 2),
    ],
)
def test_help_and_wrong_options_need_no_torch(arguments, code):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_that_the_parser_knows_can_run():
    (command,) = (one for one in build_parser()._actions if one.dest == "command")
    assert tuple(command.choices) == COMMANDS
    for name in COMMANDS:
        module = __import__(f"bayesian_lora_kernels.commands.{name}", fromlist=["run"])
        assert callable(module.run)


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell, capsys, tmp_path):
    """The script is one that bash accepts, and knows the commands and that an adapter is a path."""
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args(["--print-completion", shell])
    assert not stopped.value.code
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    if shell == "bash":
        complete = "COMP_WORDS=(blk fit adap); COMP_CWORD=2; _shtab_blk; echo ${COMPREPLY[@]}"
        (tmp_path / "adapter").mkdir()
        done = subprocess.run(["bash", "-c", f"{script}\n{complete}"], capture_output=True, text=True, cwd=tmp_path)
        assert "adapter" in done.stdout, done.stderr


def test_options_are_what_the_library_takes():
    built_in = [name for name, kind in CURVATURES.items() if kind.__module__.startswith("bayesian_lora_kernels.curv")]
    assert list(options.CURVATURES) == built_in
    assert {*options.METHODS, "map"} == {*PROBABILITY_METHODS}
    assert tuple(METHODS) == options.CALIBRATED


def test_every_public_name_is_there():
    for name in blk.__all__:
        assert getattr(blk, name) is not None
        assert name in dir(blk)
    assert {*blk._PLACES, "ops", "patch", "plots", "unpatch"} == {*blk.__all__}
    with pytest.raises(AttributeError, match="no attribute 'fits'"):
        blk.fits  # noqa: B018


def test_the_installed_command_is_this_one():
    (script,) = entry_points(group="console_scripts", name="blk")
    assert script.value == "bayesian_lora_kernels.cli:main"
