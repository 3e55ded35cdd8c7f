"""`blk demo`: the demonstration."""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import as_failures
from bayesian_lora_kernels.commands.options import Subparsers, add_json, positive


def add_parser(subparsers: Subparsers) -> ArgumentParser:
    """What `blk demo` takes."""
    parser = subparsers.add_parser(
        "demo",
        help="the whole story on text that is already on this machine",
        description="Train a small language model, fine-tune it with LoRA until it is overconfident, and compare what "
        "makes it calibrated.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="fine-tunings to average over")
    parser.add_argument("--seed", type=int, default=0, help="of the base model and the first fine-tuning")
    parser.add_argument("--out", type=Path, default="blk-demo", metavar="DIR", help="for the diagram and the JSON")
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="tiny, in seconds; the numbers mean nothing")
    return parser


def run(args: Namespace) -> int:
    """Train, fine-tune, compare, print, write."""
    from bayesian_lora_kernels.demo.run import run_demo
    from bayesian_lora_kernels.demo.settings import DemoSettings, quick_settings

    settings = quick_settings() if args.quick else DemoSettings()
    with as_failures(ImportError, RuntimeError):
        content = run_demo(settings, args.seeds, args.seed, args.out, progress=sys.stderr.isatty())
    output.write_json(args.json, content)
    return 0
