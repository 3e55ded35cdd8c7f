"""The pairs of sentences, and the scores of every token of them and of the held-out texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.commands.tokens import tokenise_text
from bayesian_lora_kernels.posterior.storage import write_text

from .settings import Settings

FILE = Path(__file__).with_name("sentences.jsonl")
KINDS = {"fact": "a false fact", "name": "a made-up or rare name"}
VERSIONS = ("true", "altered")
GAP = "{}"
TEXTS_AT_ONCE = 6


class Pair(NamedTuple):
    """A sentence with a gap, and the two words that fill it, of which the first makes it true, or usual."""

    kind: str
    sentence: str
    true: str
    altered: str

    def filled(self, version: str) -> str:
        return self.sentence.replace(GAP, getattr(self, version))


def read(path: Path = FILE) -> list[Pair]:
    """The pairs, in the order of the file."""
    return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def word_tokens(pair: Pair, version: str, pieces: Sequence[str]) -> list[int]:
    """Which of the tokens of a filled sentence hold a part of the word, given what each stands for."""
    start = pair.sentence.index(GAP)
    stop = start + len(getattr(pair, version))
    at, found = 0, []
    for i, piece in enumerate(pieces):
        if at < stop and at + len(piece) > start:
            found.append(i)
        at += len(piece)
    return found


def score(
    folder: Path, settings: Settings, pairs: Sequence[Pair], texts: Mapping[str, Sequence[str]]
) -> dict[str, list[Any]]:
    """Scores of the pairs and of the beginnings of the texts, kept in `scores.json` as they are made.

    Every text sees the same samples of the weights.

    Args:
        folder: with `base` and `adapter`.
        settings: of the run.
        pairs: of sentences.
        texts: of each kind; those with too few tokens are left out.

    Returns:
        `pairs`, a list of `{version: {"pieces", "word", and the numbers of each token but the first}}`; `held_out`, a
        list of `{"kind", and the numbers of each token but the first}`.
    """
    file = folder / "scores.json"
    scores: dict[str, list[Any]] = json.loads(file.read_text()) if file.is_file() else {"pairs": [], "held_out": []}
    rows = 2 * len(pairs) + settings.held_out * len(texts)
    done = 2 * len(scores["pairs"]) + len(scores["held_out"])
    if done == rows:
        return scores
    tokenizer, laplace = _load(folder)
    beginnings: list[tuple[str, list[int]]] = []
    for kind, some in texts.items():
        ids = [tokenizer(text)["input_ids"] for text in some]
        long = [row[: settings.length] for row in ids if len(row) >= settings.length]
        if len(long) < settings.held_out:
            raise SystemExit(f"{kind}: expected {settings.held_out} texts of {settings.length} tokens, got {len(long)}")
        beginnings += [(kind, row) for row in long[: settings.held_out]]
    with tqdm(total=rows, initial=done, desc="scoring", unit="text") as bar:
        for pair in pairs[len(scores["pairs"]) :]:
            split = {version: tokenise_text(tokenizer, pair.filled(version)) for version in VERSIONS}
            numbers = rate(laplace, [text.prefix + text.ids for text in split.values()], settings)
            record: dict[str, Any] = {}
            for (version, text), found in zip(split.items(), numbers, strict=True):
                skip = max(len(text.prefix) - 1, 0)
                own = {name: values[skip:] for name, values in found.items()}
                record[version] = {"pieces": text.pieces, "word": word_tokens(pair, version, text.pieces), **own}
            scores["pairs"].append(record)
            write_text(file, json.dumps(scores))
            bar.update(2)
        while rest := beginnings[len(scores["held_out"]) :][:TEXTS_AT_ONCE]:
            numbers = rate(laplace, [ids for _, ids in rest], settings)
            scores["held_out"] += [{"kind": kind, **found} for (kind, _), found in zip(rest, numbers, strict=True)]
            write_text(file, json.dumps(scores))
            bar.update(len(rest))
    return scores


def rate(laplace: LaplaceLoRA, rows: Sequence[Sequence[int]], settings: Settings) -> list[dict[str, list[float]]]:
    """`nll`, `nll_map`, `entropy` and `mutual_information` of every token of each row but its first."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    generator = torch.Generator().manual_seed(settings.seed)
    found = laplace.score({"input_ids": ids, "attention_mask": mask}, settings.samples, generator)
    columns = {
        "nll": -found.log_prob,
        "nll_map": -found.log_prob_map,
        "entropy": found.entropy,
        "mutual_information": found.mutual_information,
    }
    return [{name: c[n, 1 : len(row)].tolist() for name, c in columns.items()} for n, row in enumerate(rows)]


def _load(folder: Path) -> tuple[Any, LaplaceLoRA]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
    return AutoTokenizer.from_pretrained(folder / "base"), LaplaceLoRA.from_pretrained(model, folder / "adapter")
