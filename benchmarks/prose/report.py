"""From the numbers of every token to AUROCs, and to the tables of docs/next-token.md and docs/next-token-sentences.md.

`python -m benchmarks.prose.report FILE.json` writes the tables of a run into the two pages.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bayesian_lora_kernels.posterior.storage import write_text

from . import sentences
from .statistics import auroc, auroc_of_pairs, bootstrap, held_out_margins, log_loss, share_higher
from .texts import IN, OUT

MEASURES = {
    "mutual_information": "mutual information",
    "entropy": "entropy",
    "nll": "NLL",
    "gain": "log p, Laplace over MAP",
}
AFTER = 3  # tokens
PLACES = {
    "word": "the word's own tokens",
    "after": f"the {AFTER} tokens after it",
    "sentence": "the whole sentence",
}
MODELS = {
    "NLL": ("nll",),
    "NLL, entropy": ("nll", "entropy"),
    "NLL, entropy, mutual information": ("nll", "entropy", "mutual_information"),
}
DOCS = Path(__file__).parents[2] / "docs"
PAGE, LIST = DOCS / "next-token.md", DOCS / "next-token-sentences.md"
RESULTS = Path(__file__).parents[1] / "results" / "cpu-2026-11" / "next-token.json"

Numbers = dict[str, list[float]]


def with_gain(tokens: Mapping[str, Any]) -> Numbers:
    """The measures of every scored token."""
    gain = [at_map - own for at_map, own in zip(tokens["nll_map"], tokens["nll"], strict=True)]
    return {name: gain if name == "gain" else tokens[name] for name in MEASURES}


def at_places(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Means of each measure over the tokens of each place; the first tokens, before which nothing is, have none."""
    numbers = with_gain(record)
    unscored = len(record["pieces"]) - len(record["nll"])
    last = record["word"][-1]
    where = {
        "word": record["word"],
        "after": range(last + 1, min(last + 1 + AFTER, len(record["pieces"]))),
        "sentence": range(unscored, len(record["pieces"])),
    }
    return {
        place: {name: fmean(values[i - unscored] for i in tokens) for name, values in numbers.items()}
        for place, tokens in where.items()
    }


def summary(content: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the tables."""
    pairs = sentences.read()
    found: dict[str, Any] = {"pairs": {}, "word_tokens": {}}
    for kind in sentences.KINDS:
        own = [record for pair, record in zip(pairs, content["pairs"], strict=True) if pair.kind == kind]
        table = [{version: at_places(record[version]) for version in sentences.VERSIONS} for record in own]
        true, altered = (torch.tensor([float(len(r[v]["word"])) for r in own]) for v in sentences.VERSIONS)
        found["pairs"][kind] = {place: _of_pairs(table, place, altered - true) for place in PLACES}
        found["word_tokens"][kind] = {
            "auroc": auroc_of_pairs(true, altered),
            "log_loss": float(log_loss(held_out_margins((altered - true)[:, None])).mean()),
            "more": int((altered > true).sum()),
        }
    found["held_out"] = _of_held_out(content["held_out"])
    return found


def _of_pairs(table: Sequence[Mapping[str, Any]], place: str, longer: Tensor) -> dict[str, Any]:
    """`longer`, by how many tokens the altered word is, stands beside the measures in `beside_length`."""
    columns = {
        name: [torch.tensor([row[version][place][name] for row in table]) for version in sentences.VERSIONS]
        for name in MEASURES
    }
    differences = {name: altered - true for name, (true, altered) in columns.items()}
    return {
        "auroc": {name: auroc_of_pairs(*both) for name, both in columns.items()},
        "higher": {name: share_higher(*both) for name, both in columns.items()},
        "told_apart": _models(lambda names: torch.stack([differences[name] for name in names], dim=1)),
        "beside_length": _models(lambda names: torch.stack([longer, *(differences[name] for name in names)], dim=1)),
    }


def _of_held_out(texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, dict[str, Tensor]] = {}
    for kind in (IN, *OUT):
        own = [with_gain(text) for text in texts if text["kind"] == kind]
        means[kind] = {name: torch.tensor([fmean(text[name]) for text in own]) for name in MEASURES}
    inside, every = means[IN], {name: torch.cat([means[kind][name] for kind in OUT]) for name in MEASURES}
    sides = torch.cat([-torch.ones(len(inside["nll"])), torch.ones(len(every["nll"]))])

    def rows(names: Sequence[str]) -> Tensor:
        x = torch.stack([torch.cat([inside[name], every[name]]) for name in names], dim=1)
        x = (x - x.mean(dim=0)) / x.std(dim=0)
        return sides[:, None] * torch.cat([x, torch.ones(len(x), 1)], dim=1)

    tokens = [with_gain(text) for text in texts]
    ranks = torch.stack([_ranks([x for t in tokens for x in t[name]]) for name in MEASURES])
    return {
        "mean": {kind: {name: float(values.mean()) for name, values in own.items()} for kind, own in means.items()},
        "auroc": {
            kind: {name: auroc(inside[name], other[name]) for name in MEASURES}
            for kind, other in {**{kind: means[kind] for kind in OUT}, "all four": every}.items()
        },
        "told_apart": _models(rows),
        "rank_correlation_with_mutual_information": dict(zip(MEASURES, torch.corrcoef(ranks)[0].tolist(), strict=True)),
    }


def _models(rows: Callable[[Sequence[str]], Tensor]) -> dict[str, Any]:
    """Held-out log-loss of logistic regressions, and by how much mutual information lowers it."""
    losses = {title: log_loss(held_out_margins(rows(names))) for title, names in MODELS.items()}
    without, all_of_them = list(losses.values())[-2:]
    lowered = without - all_of_them
    return {
        "log_loss": {title: float(values.mean()) for title, values in losses.items()},
        "lowered_by_mutual_information": bootstrap(lambda i: float(lowered[i].mean()), len(lowered)),
    }


def _ranks(values: Sequence[float]) -> Tensor:
    _, where, count = torch.tensor(values).unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[where]


def rounded(value: Any) -> Any:
    """Five digits of every number."""
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def as_json(content: Mapping[str, Any]) -> str:
    """A line for each pair and each text."""
    text = json.dumps(content, separators=(",", ":"))
    for start in ('{"true":{"pieces"', '{"kind":"', '"summary":', '"pairs":', '"fit":', '"score":'):
        text = text.replace(start, f"\n{start}")
    return text + "\n"


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/next-token.md by their names there."""
    found = content["summary"]
    made = {}
    for kind, title in sentences.KINDS.items():
        head = ["AUROC (95 %), share of pairs", *PLACES.values()]
        rows = []
        for name, measure in MEASURES.items():
            cells = []
            for place in PLACES:
                own = found["pairs"][kind][place]
                cells.append(f"{_interval(own['auroc'][name])}, {_percent(own['higher'][name][0])}")
            rows.append([measure, *cells])
        rows.append(["number of tokens", _interval(found["word_tokens"][kind]["auroc"]), "", ""])
        made[kind] = _table(head, rows)
        head = ["held-out log-loss by", *MODELS, "lowered by the last (95 %)"]
        own = found["pairs"][kind]
        rows = [[f"{title}, {PLACES[place]}", *_losses(own[place]["told_apart"])] for place in PLACES]
        made[f"adds-{kind}"] = _table(head, rows)
    title, own = sentences.KINDS["name"], found["pairs"]["name"]  # a false word has as many tokens as the true one
    alone = found["word_tokens"]["name"]["log_loss"]
    head = [
        "held-out log-loss by the number of tokens",
        "alone",
        *(f"and {model}" for model in MODELS),
        "lowered by the last",
    ]
    rows = [[f"{title}, {PLACES[p]}", f"{alone:.3f}", *_losses(own[p]["beside_length"])] for p in PLACES]
    made["adds-beside-length"] = _table(head, rows)
    held_out = found["held_out"]
    rows = [[k, *(f"{own[name]:.4f}" for name in MEASURES)] for k, own in held_out["mean"].items()]
    made["means"] = _table(["mean of a token, nats", *MEASURES.values()], rows)
    rows = [[k, *(_interval(own[name]) for name in MEASURES)] for k, own in held_out["auroc"].items()]
    made["held-out"] = _table([f"AUROC, {IN} against", *MEASURES.values()], rows)
    head = ["held-out log-loss by", *MODELS, "lowered by the last (95 %)"]
    made["adds-held-out"] = _table(head, [[f"{IN} against all four", *_losses(held_out["told_apart"])]])
    ranks = held_out["rank_correlation_with_mutual_information"]
    made["ranks"] = _table(
        ["", *list(MEASURES.values())[1:]],
        [
            [
                "rank correlation with mutual information, all tokens of the texts",
                *(f"{r:.2f}" for r in [*ranks.values()][1:]),
            ]
        ],
    )
    made["cost"] = _table(
        ["", "tokens", "seconds", "CPU seconds", "peak memory of the process"],
        [
            [title, f"{content[key]['n_tokens']:,}", *_process(content[key]["process"])]
            for key, title in {"fit": "`blk fit`", "score": "`blk score`, picture included"}.items()
        ],
    )
    return made


def fill(page: str, made: Mapping[str, str]) -> str:
    """A page with its tables, each of which stands between `<!-- table NAME -->` and `<!-- end -->`.

    Raises:
        ValueError: if a table has no place there, or a place no table.
    """
    places = re.findall(r"<!-- table (\S+) -->", page)
    if sorted(places) != sorted(made):
        raise ValueError(f"expected places of the tables {', '.join(sorted(made))}, got {', '.join(sorted(places))}")
    return re.sub(
        r"<!-- table (\S+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- table {found[1]} -->\n{made[found[1]]}\n<!-- end -->",
        page,
        flags=re.DOTALL,
    )


def full_list(content: Mapping[str, Any]) -> str:
    """The page with every sentence."""
    pairs = sentences.read()
    parts = [
        "# The sentences of [next-token.md](next-token.md)\n",
        "Written by `python -m benchmarks.prose.report`. In each sentence, the first word in bold makes it true,",
        "or usual, and the second replaces it. Numbers, in nats, are of the first / the second:",
        f"means over the word's own tokens, over the {AFTER} tokens after it, and over the whole sentence; MI is the",
        "mutual information.",
    ]
    for kind, title in sentences.KINDS.items():
        rows = []
        for pair, record in zip(pairs, content["pairs"], strict=True):
            if pair.kind != kind:
                continue
            true, altered = (at_places(record[version]) for version in sentences.VERSIONS)
            filled = pair.sentence.replace(sentences.GAP, f"**{pair.true}** / **{pair.altered}**")
            cells = [
                f"{true[place][name]:.{digits}f} / {altered[place][name]:.{digits}f}"
                for name, digits in (("mutual_information", 3), ("entropy", 2), ("nll", 2))
                for place in PLACES
            ]
            rows.append([filled, *cells])
        head = [f"{measure}, {place}" for measure in ("MI", "entropy", "NLL") for place in PLACES]
        parts += [f"\n## {title[0].upper()}{title[1:]}\n", _table(["", *head], rows)]
    return "\n".join(parts) + "\n"


def _interval(values: Sequence[float], digits: int = 2) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in values)
    return f"{value} ({low} to {high})"


def _losses(found: Mapping[str, Any]) -> list[str]:
    losses = [f"{found['log_loss'][model]:.3f}" for model in MODELS]
    return [*losses, _interval(found["lowered_by_mutual_information"], 3)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _process(found: Mapping[str, float]) -> list[str]:
    return [f"{found['seconds']:.0f}", f"{found['cpu_seconds']:.0f}", f"{found['peak_bytes'] / 2**20:,.0f} MiB"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prose.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS, help="next-token.json of a run")
    content = json.loads(parser.parse_args().file.read_text(encoding="utf-8"))
    write_text(PAGE, fill(PAGE.read_text(encoding="utf-8"), tables(content)))
    write_text(LIST, full_list(content))


if __name__ == "__main__":
    main()
