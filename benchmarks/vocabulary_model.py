"""A language model with a vocabulary of real size, an adapter and its posterior, to try `blk score` on.

`python -m benchmarks.vocabulary_model FOLDER` writes `base`, `adapter` (with the posterior) and `text.txt`. A
byte-level BPE tokenizer learns as many tokens as the docstrings of Python's standard library give, a small Llama learns
those docstrings, and LoRA the ones of a few packages. Takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA

SPECIAL = ["<pad>", "<s>", "</s>"]
TOPICS = ("asyncio", "email")
LENGTH = 64

TEXT = """Return a future that is done when all the given coroutines are done.

If the event loop is closed, a RuntimeError is raised. The headers of an email
message are kept in the order in which they were added.

The flurble of a quantum zebra is parsed by the ISO 8601 baker, who returns a
tuple of (year, month, day) unless the marmalade has no attribute 'read'.
"""


def docstrings() -> Iterator[tuple[Path, str]]:
    library = Path(sysconfig.get_paths()["stdlib"])
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # files that test the parser
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 40:
                yield path.relative_to(library), text


def byte_pairs(texts: list[str], vocabulary: int) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )


def train(model: Any, ids: Tensor, steps: int, rate: float, watch: str) -> None:
    """Cross-entropy of the next token, at a third of the positions for the sake of a large vocabulary's cost."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.05, 1 - step / steps)
    )
    model.train()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - LENGTH - 1, (16,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        hidden = causal.model(input_ids=batch).last_hidden_state[:, :-1]
        asked = torch.rand(hidden.shape[:2]) < 1 / 3
        loss = torch.nn.functional.cross_entropy(causal.lm_head(hidden[asked]), batch[:, 1:][asked])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{watch}: step {step}, loss {float(loss.detach()):.2f}", flush=True)
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="tokens at most")
    parser.add_argument("--steps", type=int, default=500, help="of the base model")
    parser.add_argument("--adapter-steps", type=int, default=150)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = list(docstrings())
    tokenizer = byte_pairs([text for _, text in found], arguments.vocabulary)
    print(f"{len(found)} docstrings, {len(tokenizer)} tokens in the vocabulary")

    def ids(topic: bool) -> Tensor:
        texts = [text for path, text in found if (path.parts[0] in TOPICS) == topic]
        return torch.tensor([token for row in tokenizer(texts)["input_ids"] for token in row])

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    base = transformers.LlamaForCausalLM(config)
    train(base, ids(False), arguments.steps, 3e-3, "base")
    for part in (base, tokenizer):
        part.save_pretrained(arguments.folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(arguments.folder / "base")
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    own = ids(True)
    train(model, own, arguments.adapter_steps, 2e-3, "adapter")
    model.save_pretrained(arguments.folder / "adapter")
    rows = own[: len(own) // LENGTH * LENGTH].reshape(-1, LENGTH)
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in rows.split(8)]
    laplace = LaplaceLoRA(model, fisher="mc").fit(batches, progress=False).optimize_prior_precision()
    laplace.save_pretrained(arguments.folder / "adapter")
    (arguments.folder / "text.txt").write_text(TEXT, encoding="utf-8")
    print(f"{len(rows)} texts fitted, prior precision {float(laplace.prior_precision):.3g}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
