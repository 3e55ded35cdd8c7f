"""What the checks of a model cost, in a fit of 20 batches and in a first and a later prediction.

    python -m benchmarks.checks [--rounds 5] [--vocabulary 1000] [--json FILE]

A 4-layer Llama of width 512 with LoRA r = 8 on q and v, batches of 8 padded texts of 64 tokens, four classes. Fits with
`check="first"`, `"always"` and `"off"` alternate in one process; medians, the first round left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bayesian_lora_kernels as blk

MODES = ("off", "first", "always")
FITS: dict[str, dict[str, Any]] = {
    "K-FAC, sampled Fisher": {"curvature": "kfac", "fisher": "mc"},
    "K-FAC, exact Fisher": {"curvature": "kfac", "fisher": "exact"},
    "EKFAC, exact Fisher": {"curvature": "ekfac", "fisher": "exact"},
}
BATCHES, EXAMPLES, TOKENS, CLASSES = 20, 8, 64, [11, 12, 13, 14]


def build(vocabulary: int) -> Any:
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()


def batch(seed: int, vocabulary: int) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (EXAMPLES, TOKENS), generator=noise)
    lengths = TOKENS - 3 * torch.arange(EXAMPLES)
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    labels = torch.randint(0, len(CLASSES), (EXAMPLES,), generator=noise)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def measure(rounds: int, vocabulary: int) -> list[dict[str, Any]]:
    model, batches = build(vocabulary), [batch(i, vocabulary) for i in range(BATCHES)]
    rows = []
    for name, settings in FITS.items():
        seconds: dict[str, dict[str, list[float]]] = {mode: {"fit": [], "first": [], "later": []} for mode in MODES}
        for _ in range(rounds + 1):
            for mode in MODES:
                laplace = blk.LaplaceLoRA(model, class_token_ids=CLASSES, check=mode, **settings)
                for what in ("fit", "first", "later"):
                    started = time.perf_counter()
                    if what == "fit":
                        laplace.fit(batches, progress=False)
                    else:
                        laplace.predict(batches[0 if what == "first" else 2])
                    seconds[mode][what].append(time.perf_counter() - started)
                    if what == "first":
                        laplace.predict(batches[1])  # the second is checked, too
        for mode in MODES:
            medians = {what: statistics.median(times[1:]) for what, times in seconds[mode].items()}
            rows.append({"curvature": name, "check": mode, "seconds": medians})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = measure(args.rounds, args.vocabulary)
    print(f"{'':<24}{'check':<8}{'fit of 20':>12}{'':>10}{'first prediction':>18}{'later':>10}")
    for row in rows:
        seconds = row["seconds"]
        off = next(r["seconds"] for r in rows if r["curvature"] == row["curvature"] and r["check"] == "off")
        print(
            f"{row['curvature']:<24}{row['check']:<8}{seconds['fit']:>10.2f} s{seconds['fit'] / off['fit']:>9.3f}x"
            f"{seconds['first']:>16.3f} s{seconds['later']:>8.3f} s"
        )
    if args.json is not None:
        content = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
