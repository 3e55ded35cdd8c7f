"""The command line, `blk`. Each command adds its own parser and sets `run`, arguments -> exit code."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

FAILED, BAD_USE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 for success, 1 for failure, 2 for bad use)."""
    args = build_parser().parse_args(arguments)
    code: int = args.run(args)
    return code


def build_parser() -> ArgumentParser:
    """The parser with every command."""
    from bayesian_lora_kernels import __version__
    from bayesian_lora_kernels.commands import add_commands

    parser = ArgumentParser(prog="blk", description="Laplace posteriors over LoRA weights.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(subparsers)
    _add_doctor(subparsers)
    _add_bench(subparsers)
    add_commands(subparsers)
    return parser


def _add_demo(subparsers: _SubParsersAction[ArgumentParser]) -> None:
    demo = subparsers.add_parser(
        "demo",
        help="the whole story on text that is already on this machine",
        description="Train a small language model, fine-tune it with LoRA until it is overconfident, and compare what "
        "makes it calibrated.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--seeds", type=_positive, default=1, metavar="N", help="fine-tunings to average over")
    demo.add_argument("--seed", type=int, default=0, help="of the base model and the first fine-tuning")
    demo.add_argument("--out", type=Path, default=Path("blk-demo"), metavar="DIR", help="for the diagram and the JSON")
    demo.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    demo.add_argument("--quick", action="store_true", help="tiny, in seconds; the numbers mean nothing")
    demo.set_defaults(run=_demo)


def _add_doctor(subparsers: _SubParsersAction[ArgumentParser]) -> None:
    doctor = subparsers.add_parser(
        "doctor",
        help="what this machine can run, and a self-test",
        description="Versions, devices, what can run here and why not the rest, and a self-test. With an adapter and a "
        "file of prompts, also a test on that model: Jacobians against autograd, logits against those of each example "
        "alone, a fit in pieces against one in one piece.",
    )
    doctor.add_argument("--adapter", type=Path, metavar="FOLDER", help="PEFT adapter folder to verify")
    doctor.add_argument("--model", metavar="MODEL", help="its base model; default: what the adapter says")
    doctor.add_argument("--data", type=Path, metavar="FILE", help='JSON lines {"prompt": ...} to verify it on')
    doctor.add_argument("--choices", nargs="+", metavar="CHOICE", help="what the model chooses between, as for blk fit")
    doctor.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    doctor.add_argument("--dtype", default="auto", help="of the base model; default: as it was saved")
    doctor.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")
    doctor.set_defaults(run=_doctor)


def _add_bench(subparsers: _SubParsersAction[ArgumentParser]) -> None:
    bench = subparsers.add_parser(
        "bench",
        help="how fast every operation is here",
        description="Every operation in every implementation that runs here, checked against float64 and timed.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument(
        "--device", default=None, metavar="DEVICE", help="cpu, cuda, cuda:1; None: a GPU if there is one"
    )
    bench.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the inputs")
    bench.add_argument("--quick", action="store_true", help="tiny sizes, in seconds; the times mean nothing")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    bench.set_defaults(run=_bench)


def _demo(args: Namespace) -> int:
    from bayesian_lora_kernels.demo.run import run_demo
    from bayesian_lora_kernels.demo.settings import DemoSettings, quick_settings

    settings = quick_settings() if args.quick else DemoSettings()
    try:
        _check_json(args.json)
        content = run_demo(settings, args.seeds, args.seed, args.out, progress=sys.stderr.isatty())
        _write_json(args.json, content)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"blk demo: {error}", file=sys.stderr)
        return FAILED
    return 0


def _doctor(args: Namespace) -> int:
    from bayesian_lora_kernels.commands.errors import InputError
    from bayesian_lora_kernels.commands.verification import verify_adapter
    from bayesian_lora_kernels.demo.doctor import examine, format_report

    try:
        _check_json(args.json)
        report = examine()
        print(format_report(report))
        if args.adapter is not None:
            found = verify_adapter(args)
            print(f"\n{args.adapter}\n{found}")
            report |= {"model": found.as_dict(), "ok": report["ok"] and found.ok}
        _write_json(args.json, report)
    except InputError as error:
        print(f"blk doctor: {error}", file=sys.stderr)
        return BAD_USE
    except OSError as error:
        print(f"blk doctor: {error}", file=sys.stderr)
        return FAILED
    return 0 if report["ok"] else FAILED


def _bench(args: Namespace) -> int:
    import torch

    from bayesian_lora_kernels.demo.bench import SIZES, format_rows, measure

    try:
        _check_json(args.json)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)  # the device is there, or this says why not
        size = SIZES["quick" if args.quick else "cuda" if device.type == "cuda" else "cpu"]
        rows = measure(device, getattr(torch, args.dtype), size, progress=sys.stderr.isatty())
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        )
        print(f"{name}, PyTorch {torch.__version__}, inputs {args.dtype}\n\n{format_rows(rows)}")
        _write_json(args.json, {"device": name, "torch": torch.__version__, "dtype": args.dtype, "rows": rows})
    except (AssertionError, OSError, RuntimeError) as error:  # PyTorch without CUDA asserts that it had it
        print(f"blk bench: {error}", file=sys.stderr)
        return FAILED
    return FAILED if any(row["error"] is not None and row["seconds"] is None for row in rows) else 0


def _check_json(path: Path | None) -> None:
    """Before long work: can the file be written?"""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise OSError(f"--json {path}: expected a file in a folder that exists")


def _write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        from bayesian_lora_kernels.posterior.storage import write_text

        write_text(path, json.dumps(content, indent=2) + "\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
