"""The command line, `blk`."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from bayesian_lora_kernels.commands.errors import BAD_USE, CommandError, said
from bayesian_lora_kernels.commands.output import check_outputs, give_up_stdout, say, warn
from bayesian_lora_kernels.commands.parser import build_parser

INTERRUPTED = 130  # as a shell says of Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0 for success, 1 for failure, 2 for bad use, 130 after Ctrl-C)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: the next file would be opened in its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    args = build_parser().parse_args(arguments)
    with warnings.catch_warnings(), _logged_warnings():
        warnings.showwarning = _show  # without a place in the source, which says nothing to who runs a command
        for category in (DeprecationWarning, FutureWarning):  # those are for the authors of what we call
            warnings.simplefilter("ignore", category)
        try:
            check_outputs(args)
            code: int = importlib.import_module(f"bayesian_lora_kernels.commands.{args.command}").run(args)
        except BrokenPipeError:  # whoever reads has seen enough, such as `| head`
            give_up_stdout()
            return 0
        except KeyboardInterrupt:
            say(f"blk {args.command}", "interrupted", "red")
            return INTERRUPTED
        except CommandError as error:
            say(f"blk {args.command}", str(error), "red")
            return error.code
        except OSError as error:
            say(f"blk {args.command}", said(error), "red")
            return BAD_USE
    return code


@contextmanager
def _logged_warnings() -> Iterator[None]:
    """What the library logs at WARNING looks like the other warnings."""
    logger, handler = logging.getLogger("bayesian_lora_kernels"), _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn(" ".join(record.getMessage().split()))


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    warn(" ".join(str(message).split()))


if __name__ == "__main__":
    sys.exit(main())
