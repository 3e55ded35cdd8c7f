"""10,000 predictions and 200 fits in one process: what stays in memory. `make soak`, or `python -m benchmarks.soak`.

Batches have as many shapes as caches could be keyed by: 1 to 8 texts of 3 to 40 tokens, padded on either side or not
at all. Fits take turns between the curvatures, every tenth posterior is saved and loaded, and every twentieth
prediction is of the vocabulary or of a whole text. The resident set is read after every hundredth of the work, and the
tensors that Python knows are counted. Exit code 1 if memory grew.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from bayesian_lora_kernels import LaplaceLoRA
from bayesian_lora_kernels.plots.style import BLUE, WIDTH, new_figure, save_figure, styled

from .peak_memory import reset_peak

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FITS, PREDICTIONS = 200, 10_000
READINGS = 100
CURVATURES = ("kfac", "ekfac", "exact")
LIMIT = 2 * 10**6  # bytes, after a tenth of the work, when every kind of call has been made


def model() -> peft.PeftModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).eval()


def batch(generator: torch.Generator) -> dict[str, Tensor]:
    """Of a random shape."""
    n, t, padding = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 9), (3, 41), (0, 3)))
    ids = torch.randint(1, 97, (n, t), generator=generator)
    mask = torch.ones_like(ids)
    for row, left in enumerate(torch.randint(0, t - 1, (n,), generator=generator).tolist()):
        if padding and row:
            mask[row, :left] = 0
    mask = mask.flip(1) if padding == 1 else mask
    labels = torch.randint(2, (n,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def run(fits: int, predictions: int) -> list[dict[str, int]]:
    """`{calls, resident bytes, tensors}` at each reading."""
    adapted, generator, readings = model(), torch.Generator().manual_seed(0), []
    done, per_fit = 0, predictions // fits
    for fit in tqdm(range(fits), desc="soak", unit="fit"):
        kind = CURVATURES[fit % len(CURVATURES)]
        laplace = LaplaceLoRA(adapted, class_token_ids=[3, 5], curvature=kind, rank=4, rank_threshold=16)
        laplace.fit([batch(generator) for _ in range(3)], progress=False)
        laplace.optimize_prior_precision()
        if fit % 10 == 0:
            with tempfile.TemporaryDirectory() as folder:
                laplace.save_pretrained(folder)
                laplace = LaplaceLoRA.from_pretrained(adapted, folder)
        for _ in range(per_fit):
            done += 1
            predict(laplace, batch(generator), done)
        if (fit + 1) % max(fits // READINGS, 1) == 0:
            resident = reset_peak()
            tensors = sum(isinstance(one, Tensor) for one in gc.get_objects())
            readings.append({"fits": fit + 1, "predictions": done, "resident": resident, "tensors": tensors})
    return readings


def predict(laplace: LaplaceLoRA, given: dict[str, Tensor], number: int) -> None:
    if number % 40 == 0:
        laplace.predict_vocabulary(given).probs(8)
    elif number % 40 == 20:
        laplace.score(given, n_samples=8)
    else:
        laplace.predict(given, differences=number % 2 == 0).probs("pairwise")


def growth(readings: list[dict[str, int]]) -> float:
    """Bytes of the resident set from the second tenth of the readings to the last."""
    tenth = max(len(readings) // 10, 1)
    early, late = (fmean(one["resident"] for one in part) for part in (readings[tenth : 2 * tenth], readings[-tenth:]))
    return late - early


@styled()
def draw(readings: list[dict[str, int]]) -> Figure:
    figure = new_figure(WIDTH, 2.8)
    calls, resident = [one["predictions"] for one in readings], [one["resident"] / 1e6 for one in readings]
    whole, above = figure.subplots(1, 2)
    whole.plot(calls, resident, color=BLUE)
    whole.set(ylabel="resident memory, MB", ylim=(0, 1.2 * max(resident)))
    above.plot(calls, [size - resident[0] for size in resident], color=BLUE)
    above.set(ylabel="more than after the first fit, MB")
    for axes in (whole, above):
        axes.set(xlabel=f"predictions ({calls[-1] // readings[-1]['fits']} for each fit)")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=FITS)
    parser.add_argument("--predictions", type=int, default=PREDICTIONS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the readings")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them, as .svg or .png")
    arguments = parser.parse_args()
    readings = run(arguments.fits, arguments.predictions)
    grown = growth(readings)
    summary: dict[str, Any] = {"growth": grown, "limit": LIMIT, "readings": readings}
    first, last = readings[len(readings) // 10], readings[-1]
    print(
        f"{last['fits']} fits, {last['predictions']} predictions: resident {first['resident'] / 1e6:.1f} MB after a "
        f"tenth, {last['resident'] / 1e6:.1f} MB at the end; growth {grown / 1e3:+.0f} kB; tensors {first['tensors']}, "
        f"{last['tensors']}"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        save_figure(draw(readings), arguments.plot)
    sys.exit(grown > LIMIT)


if __name__ == "__main__":
    main()
