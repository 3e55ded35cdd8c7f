"""benchmarks.prose: its sentences, its texts, its statistics, and its pages against their numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import peft
import pytest
import test_score_command
import torch
import transformers
from test_demo_ratings import archive

from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.commands.tokens import tokenise_text
from bayesian_lora_kernels.demo.ratings import FILES, INNER
from benchmarks.prose import report, sentences, tuning
from benchmarks.prose.sentences import Pair
from benchmarks.prose.settings import Settings
from benchmarks.prose.statistics import (
    RIDGE,
    auroc,
    auroc_of_pairs,
    bootstrap,
    held_out_margins,
    log_loss,
    share_higher,
)
from benchmarks.prose.texts import IN, LONGEST, OUT, SHORTEST, read_texts

made = test_score_command.made
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(report.RESULTS.read_text(encoding="utf-8"))
    return found


def test_the_sentences_are_well_formed():
    pairs = sentences.read()
    assert {kind: sum(pair.kind == kind for pair in pairs) for kind in sentences.KINDS} == {"fact": 52, "name": 48}
    assert len({pair.filled(version) for pair in pairs for version in sentences.VERSIONS}) == 2 * len(pairs)
    for pair in pairs:
        assert pair.sentence.count(sentences.GAP) == 1
        assert re.fullmatch(r"[A-Z][^{}]*(?<![\w]){}(?!\w)[^{}]+\.", pair.sentence), pair
        assert pair.true != pair.altered
        for word in (pair.true, pair.altered):
            assert re.fullmatch(r"\w+( \w+)?", word), pair
            # Nothing else in the sentence tells the word.
            assert not re.search(rf"\b{word}\b", pair.sentence), pair


def test_which_tokens_are_of_the_word():
    pair = Pair("fact", "In {}, now.", "New York", "Ur")
    assert sentences.word_tokens(pair, "true", ["In", " New", " Yo", "", "rk", "", ",", " now", "."]) == [1, 2, 3, 4]
    assert sentences.word_tokens(pair, "altered", ["In", " ", "Ur,", " now."]) == [2]


@pytest.mark.parametrize("unscored", [0, 1])
def test_means_at_the_places(unscored: int):
    count = 9
    generator = torch.Generator().manual_seed(0)
    numbers = {
        name: torch.rand(count - unscored, generator=generator).tolist()
        for name in ("nll", "nll_map", "entropy", "mutual_information")
    }
    found = report.at_places({"pieces": ["x"] * count, "word": [2, 3], **numbers})
    for name, values in numbers.items():
        if name != "nll_map":
            assert found["word"][name] == pytest.approx(fmean(values[2 - unscored : 4 - unscored]))
            assert found["after"][name] == pytest.approx(fmean(values[4 - unscored : 7 - unscored]))
            assert found["sentence"][name] == pytest.approx(fmean(values))
    gain = [a - b for a, b in zip(numbers["nll_map"], numbers["nll"], strict=True)]
    assert found["sentence"]["gain"] == pytest.approx(fmean(gain))


def test_aurocs_and_shares_count_pairs():
    generator = torch.Generator().manual_seed(1)
    lower = torch.randint(0, 6, (40,), generator=generator).double()
    higher = torch.randint(1, 8, (40,), generator=generator).double()
    wins = [(b > a) + 0.5 * (b == a) for a in lower.tolist() for b in higher.tolist()]
    paired = [(b > a) + 0.5 * (b == a) for a, b in zip(lower.tolist(), higher.tolist(), strict=True)]
    for found, truth in (
        (auroc(lower, higher), fmean(wins)),
        (auroc_of_pairs(lower, higher), fmean(wins)),
        (share_higher(lower, higher), fmean(paired)),
    ):
        assert found.value == pytest.approx(truth, abs=1e-12)
        assert found.low < found.value < found.high
    share, error = fmean(paired), torch.tensor(paired).std(correction=0).item() / 40**0.5
    found = share_higher(lower, higher)
    assert found.low == pytest.approx(share - 1.96 * error, abs=0.03)
    assert found.high == pytest.approx(share + 1.96 * error, abs=0.03)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(2)
    held = 0
    for seed in range(60):
        x = torch.randn(50, generator=generator, dtype=torch.float64)
        found = bootstrap(lambda rows, x=x: float(x[rows].mean()), 50, seed=seed)
        held += found.low < 0 < found.high
    assert 50 <= held <= 60


def test_margins_are_those_of_a_regression_without_the_row():
    """Against the same penalised likelihood maximised by LBFGS and automatic derivatives."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(12, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.5, 0.0, -0.2])
    found = held_out_margins(rows)
    scaled = rows / rows.square().mean(dim=0).sqrt()
    for i in (0, 5, 11):
        others = torch.cat([scaled[:i], scaled[i + 1 :]])
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [w], max_iter=200, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )

        def loss(w=w, others=others, solver=solver):
            solver.zero_grad()
            value = -torch.nn.functional.logsigmoid(others @ w).mean() + 0.5 * RIDGE * w.square().sum()
            value.backward()
            return value

        solver.step(loss)
        assert float(found[i]) == pytest.approx(float(scaled[i] @ w.detach()), abs=1e-6)
        assert float(log_loss(found)[i]) == pytest.approx(-float(torch.sigmoid(found[i]).log()), abs=1e-12)


def test_ranks_of_ties_are_their_mean():
    values = [3.0, 1.0, 3.0, 2.0, 3.0]
    truth = [1 + sum(b < a for b in values) + (values.count(a) - 1) / 2 for a in values]
    assert report._ranks(values).tolist() == truth == [4.0, 1.0, 4.0, 2.0, 4.0]


def test_no_editorial_is_in_both_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def sentence(name: str) -> str:
        return " ".join(f"{name}{i}" for i in range(SHORTEST + 3))

    editorials = [f"{d}_{i}\t0.1\t{sentence(f'd{d}s{i}w')}" for d in range(12) for i in range(5)]
    files = {
        FILES[IN]: "\n".join(editorials),
        FILES["amazon"]: "\n".join(f"{d}_{i}\t1\t{sentence(f'a{d}s{i}w')}" for d in range(4) for i in range(2)),
        FILES["movies"]: f"1\t1\t{sentence('m')}\n2\t1\ttoo short",
        FILES["tweets"]: f"1\t1\t{sentence('t')}\n2\t1\t{sentence('t')}",
    }
    monkeypatch.setattr("benchmarks.prose.texts.docstrings", lambda: [(tmp_path, sentence(f"s{i}")) for i in range(9)])
    path = tmp_path / "source.tar.gz"
    path.write_bytes(archive({INNER: archive({name: text.encode() for name, text in files.items()})}))
    texts = read_texts(path, train=7, held_out=3, seed=0)
    assert len(texts.train) == 7
    assert all(SHORTEST <= len(text.split()) <= LONGEST for text in texts.train)
    assert {kind: len(some) for kind, some in texts.held_out.items()} == {
        IN: 3, "movies": 1, "amazon": 3, "tweets": 1, "docstrings": 3,
    }  # fmt: skip
    assert tuple(texts.held_out) == (IN, *OUT)
    of = {kind: {text.split("s")[0] for text in some} for kind, some in (("a", texts.train), ("b", texts.held_out[IN]))}
    assert not of["a"] & of["b"]
    assert read_texts(path, 7, 3, 0) == texts
    assert read_texts(path, 7, 3, 1) != texts


def test_scores_are_those_of_blk_score_and_go_on_where_they_stopped(made: Path, tmp_path: Path):
    (tmp_path / "base").symlink_to(made / "base")
    (tmp_path / "adapter").symlink_to(made / "adapter")
    settings = Settings(held_out=2, length=8, samples=6)
    pairs = [Pair("fact", "The {} is here.", "text", "Zyxq"), Pair("name", "In {} again.", "one", "other words")]
    texts = {
        IN: ["return the first of the items", "a", "def first(items): return items[0]"],
        "x": ["a list of the words in x"] * 2,
    }
    with pytest.raises(SystemExit, match="expected 3 texts of 8 tokens, got 2"):
        sentences.score(tmp_path, Settings(held_out=3, length=8, samples=6), pairs, texts)
    found = sentences.score(tmp_path, settings, pairs, texts)
    assert sentences.score(tmp_path, settings, pairs, texts) == found

    (tmp_path / "scores.json").write_text(json.dumps({"pairs": found["pairs"][:1], "held_out": []}))
    assert sentences.score(tmp_path, settings, pairs, texts) == found

    for pair, record in zip(pairs, found["pairs"], strict=True):
        for version in sentences.VERSIONS:
            (tmp_path / "text.txt").write_text(pair.filled(version))
            words = ["score", str(made / "adapter"), str(tmp_path / "text.txt"), "--device", "cpu", "--samples", "6"]
            assert main([*words, "--json", str(tmp_path / "score.json")]) == 0
            tokens = json.loads((tmp_path / "score.json").read_text())["tokens"]
            own = record[version]
            assert own["pieces"] == [token["text"] for token in tokens]
            assert getattr(pair, version) in "".join(own["pieces"][i] for i in own["word"])
            for name in ("entropy", "mutual_information"):
                assert own[name] == pytest.approx([token[name] for token in tokens], abs=1e-5)
            assert own["nll"] == pytest.approx([-token["log_prob"] for token in tokens], abs=1e-5)
            assert own["nll_map"] == pytest.approx([-token["log_prob_map"] for token in tokens], abs=1e-5)
    assert [one["kind"] for one in found["held_out"]] == [IN, IN, "x", "x"]
    assert all(len(one["nll"]) == settings.length - 1 for one in found["held_out"])


def test_fine_tuning_learns_the_texts(made: Path, tmp_path: Path):
    texts = ["return the first of the items", "def first(items): return items[0]", "the items are a list"]
    result = tuning.fine_tune(made / "base", texts, tmp_path / "adapter", epochs=60, batch=2, rate=0.02, seed=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "base")

    def nll(model: Any) -> float:
        every = []
        for text in texts:
            ids = torch.tensor([tokenise_text(tokenizer, text).prefix + tokenise_text(tokenizer, text).ids])
            log_p = torch.log_softmax(model(ids).logits[0, :-1].double(), dim=-1)
            every += (-log_p.gather(1, ids[0, 1:, None])).flatten().tolist()
        assert len(every) == result["tokens"]
        return fmean(every)

    base = transformers.AutoModelForCausalLM.from_pretrained(made / "base").eval()
    with torch.no_grad():
        before = nll(base)
        after = nll(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    assert after < 0.8 * before
    assert after == pytest.approx(result["loss"], abs=0.25)


def test_the_pages_agree_with_the_numbers(content: dict[str, Any]):
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.fill(page, report.tables(content)) == page
    assert report.LIST.read_text(encoding="utf-8") == report.full_list(content)
    words, *_ = page.split("## What was done")
    figures = re.findall(r"\d\.\d{2,}", words)
    assert len(figures) > 20
    assert not [figure for figure in figures if figure not in "".join(report.tables(content).values())]
    assert f"But {content['summary']['word_tokens']['name']['more']} of\n" in words
    with pytest.raises(ValueError, match="expected places of the tables"):
        report.fill(page.replace("<!-- table cost -->", ""), report.tables(content))


def test_the_summary_is_of_the_scores(content: dict[str, Any]):
    pairs = sentences.read()
    assert len(content["pairs"]) == len(pairs)
    for pair, record in zip(pairs, content["pairs"], strict=True):
        for version in sentences.VERSIONS:
            own = record[version]
            assert "".join(own["pieces"]) == pair.filled(version)
            assert own["word"] == sentences.word_tokens(pair, version, own["pieces"])
    for kind in sentences.KINDS:
        own = [record for pair, record in zip(pairs, content["pairs"], strict=True) if pair.kind == kind]
        for name in ("mutual_information", "entropy", "nll"):
            true, altered = ([fmean(record[version][name]) for record in own] for version in sentences.VERSIONS)
            wins = fmean(float(b > a) + 0.5 * (b == a) for a in true for b in altered)
            paired = fmean(float(b > a) + 0.5 * (b == a) for a, b in zip(true, altered, strict=True))
            found = content["summary"]["pairs"][kind]["sentence"]
            assert found["auroc"][name][0] == pytest.approx(wins, abs=1e-3)
            assert found["higher"][name][0] == pytest.approx(paired, abs=1e-4)
        lengths = [[len(record[version]["word"]) for record in own] for version in sentences.VERSIONS]
        longer = torch.tensor(lengths[1]) - torch.tensor(lengths[0])
        told = content["summary"]["word_tokens"][kind]
        assert told["more"] == int((longer > 0).sum())
        assert told["auroc"][0] == pytest.approx(
            fmean((b > a) + 0.5 * (b == a) for a in lengths[0] for b in lengths[1]), abs=1e-3
        )
        if kind == "fact":
            assert (longer == 0).all()  # which docs/next-token.md and its tables go by
    for kind, own in content["summary"]["held_out"]["mean"].items():
        texts = [text for text in content["held_out"] if text["kind"] == kind]
        assert len(texts) == content["settings"]["held_out"]
        assert own["nll"] == pytest.approx(fmean(fmean(text["nll"]) for text in texts), rel=1e-4)
