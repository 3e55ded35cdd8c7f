"""`blk score` on an adapter folder and a text, as a user calls it."""

from __future__ import annotations

import ast
import json
import shutil
import textwrap
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.commands.highlight import ScoredToken, draw, html, top_of_scale
from bayesian_lora_kernels.commands.tokens import tokenise_text

TEXT = "def first(items):\n    # Größe 🙂 <b>\n    return items[0]\n"


def byte_pairs(prefix: str = "<s> ") -> Any:
    """A byte-level tokenizer, as of most models, learnt from the standard library's own words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([ast.__doc__ or "", textwrap.__doc__ or "", Path(ast.__file__).read_text()], trainer)
    if prefix:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", model_max_length=64
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score")
    tokenizer = byte_pairs()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    model = peft.get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder / "adapter")
    (folder / "text.py").write_text(TEXT, encoding="utf-8")
    laplace(folder).save_pretrained(folder / "adapter")
    return folder


def laplace(folder: Path) -> LaplaceLoRA:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    ids = torch.randint(2, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    return LaplaceLoRA(model, prior_precision=4.0).fit([{"input_ids": ids, "labels": ids}], progress=False)


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    shutil.copy(made / "text.py", tmp_path / "text.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blk(*options: str, text: str = "text.py") -> int:
    return main(["score", "adapter", text, "--device", "cpu", "--samples", "6", *options])


class Page(HTMLParser):
    """The text inside `pre`, and the notes of its spans."""

    def __init__(self, content: str):
        super().__init__()
        self.text, self.notes, self._inside = "", [], False
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self._inside |= tag == "pre"
        if tag == "span":
            self.notes.append(dict(attrs)["title"])

    def handle_endtag(self, tag):
        self._inside &= tag != "pre"

    def handle_data(self, data):
        if self._inside:
            self.text += data


def test_what_is_written_and_printed_is_what_python_gives(made, place, capsys):
    pytest.importorskip("matplotlib")
    assert blk("--json", "out.json", "--html", "out.html", "--plot", "out.png") == 0
    printed = capsys.readouterr().out
    content = json.loads(Path("out.json").read_text(encoding="utf-8"))
    tokenizer = byte_pairs()
    ids = tokenizer(TEXT)["input_ids"]
    assert [token["token_id"] for token in content["tokens"]] == ids[1:]
    assert "".join(token["text"] for token in content["tokens"]) == TEXT
    truth = laplace(made).score({"input_ids": torch.tensor([ids])}, 6, torch.Generator().manual_seed(0))
    for name in ("log_prob_map", "log_prob", "entropy", "mutual_information"):
        found = torch.tensor([token[name] for token in content["tokens"]])
        torch.testing.assert_close(found, getattr(truth, name)[0, 1:], atol=1e-5, rtol=1e-4)
        assert content["means"][name] == pytest.approx(float(found.mean()), rel=1e-5)
    assert f"{len(ids) - 1} tokens of text.py, {len(ids) - 1} of them scored" in printed
    for token in content["tokens"]:
        assert repr(token["text"]) in printed
    page = Page(Path("out.html").read_text(encoding="utf-8"))
    assert page.text == TEXT
    assert len(page.notes) == len(ids) - 1
    assert f"log p {content['tokens'][3]['log_prob']:.3f}" in page.notes[3]
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_text_is_read_in_windows_that_overlap(made, place):
    long = TEXT * 4
    Path("text.py").write_text(long, encoding="utf-8")
    assert blk("--json", "out.json", "--window", "21") == 0
    tokens = json.loads(Path("out.json").read_text(encoding="utf-8"))["tokens"]
    assert "".join(token["text"] for token in tokens) == long
    ids = byte_pairs()(long)["input_ids"]
    own, room = ids[1:], 20
    assert len(own) > 60
    scorer = laplace(made)
    for i, token in enumerate(tokens):
        # the first window that reaches the token
        start = 0 if i < room else ((i - room) // 10 + 1) * 10
        window = [1, *own[start : start + room]]
        truth = scorer.score({"input_ids": torch.tensor([window])}, 6, torch.Generator().manual_seed(0))
        assert token["log_prob"] == pytest.approx(float(truth.log_prob[0, 1 + i - start]), abs=1e-4)
        if i >= 25:
            break


def test_without_a_token_before_the_text_the_first_has_no_score(made, place, capsys):
    byte_pairs(prefix="").save_pretrained("adapter")
    assert blk("--json", "out.json", "--html", "out.html") == 0
    tokens = json.loads(Path("out.json").read_text(encoding="utf-8"))["tokens"]
    assert tokens[0]["log_prob"] is None
    assert all(token["log_prob"] is not None for token in tokens[1:])
    assert f"{len(tokens)} tokens of text.py, {len(tokens) - 1} of them scored" in capsys.readouterr().out
    assert Page(Path("out.html").read_text(encoding="utf-8")).text == TEXT
    Path("text.py").write_text("a")
    assert blk() == 2
    assert "a single token" in capsys.readouterr().err


def test_pieces_of_a_text(made):
    tokenizer = byte_pairs()
    text = tokenise_text(tokenizer, "Größe 🙂\n")
    assert text.prefix == [1]
    assert "".join(text.pieces) == "Größe 🙂\n"
    assert len(text.pieces) == len(text.ids) > 5
    assert "" in text.pieces  # the smiling face is several tokens


BAD = {
    "no file": (("--json", "x.json"), "nothing.txt", "nothing.txt: no such file"),
    "a folder": ((), "adapter", "expected a text file, got a folder"),
    "empty": ((), "empty.txt", "empty.txt: it has no tokens"),
    "binary": ((), "binary.txt", "not UTF-8 text"),
    "plot": (("--plot", "x.gif"), "text.py", "expected a name that ends in .png"),
    "html in no folder": (("--html", "no/x.html"), "text.py", "the folder no does not exist"),
    "the text itself": (("--html", "text.py"), "text.py", "this is the text"),
    "window": (("--window", "2"), "text.py", "--window: expected more than 2, got 2"),
    "posterior": (("--posterior", "."), "text.py", "no posterior (laplace.json) in it; run blk fit first"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(place, capsys, name):
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    options, text, message = BAD[name]
    assert blk(*options, text=text) == 2
    error = capsys.readouterr().err
    assert error.startswith("blk score: ")
    assert message in error


def test_colours_follow_the_mutual_information():
    tokens = [ScoredToken(i, f"w{i} ", -1.0, -1.0, 1.0, i / 10) for i in range(11)]
    assert top_of_scale(tokens) == 0.9
    page = html(tokens, "<title>")
    assert "&lt;title&gt;" in page
    colours = [part.split('"')[0] for part in page.split('style="background:')[1:]]
    assert colours[0] == "#ffffff"
    assert colours[-1] == colours[-2] == "#f27a54"
    assert len(set(colours)) == 10


def test_a_picture_of_a_very_long_text_is_cut(tmp_path):
    pytest.importorskip("matplotlib")
    tokens = [ScoredToken(0, "\n", -1.0, -1.0, 1.0, 0.1)] * 3000
    draw(tokens, tmp_path / "long.svg")
    content = (tmp_path / "long.svg").read_text()
    assert len(content) < 10**6
