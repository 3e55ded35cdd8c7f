"""`blk demo`: the demonstration."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext

from bayesian_lora_kernels.commands import output
from bayesian_lora_kernels.commands.errors import InputError, as_failures
from bayesian_lora_kernels.commands.parser import TINY
from bayesian_lora_kernels.commands.parts import Table

OF_OTHERS = ("data", "choices", "shift", "cache", "device", "dtype")  # options that the tiny model has no use for


def run(args: Namespace) -> int:
    """Train, fine-tune, compare, print, write."""
    from bayesian_lora_kernels.demo.problem import Problem
    from bayesian_lora_kernels.demo.run import run_demo

    progress = output.watched()
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

    output.check_folder(args.out, "--out ")
    if args.cache is not None:
        output.check_folder(args.cache, "--cache ")
    with as_failures(ImportError, RuntimeError, ValueError), few_threads() if tiny else nullcontext():
        content, report = run_demo(problem, args.seeds, args.seed, args.out, progress)
    output.write_json(args.json, content)
    output.show(args, *(one if isinstance(one, str) else Table(one.rows(), plain=str(one)) for one in report))
    return 0
