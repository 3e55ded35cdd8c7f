"""Which image to label next: random choice, entropy, mutual information, on the digits that scikit-learn carries.

    python -m benchmarks.active_learning [--seeds 10] [--json FILE]

A perceptron 64-32-10 is trained anew on 20 labels of the pool, then on 15 more each time. Entropy is that of the plain
softmax; mutual information that between a label and the weights under the exact posterior, with the prior of the
evidence.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bayesian_lora_kernels as blk

COUNTS = range(20, 126, 15)
POOL = 1000  # of 1,797; the others are the test set
Score = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # of the pool: higher is chosen first


def random_choice(model: nn.Module, pool: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    return torch.rand(len(pool))


def entropy(model: nn.Module, pool: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.special.entr(model(pool).softmax(dim=-1)).sum(dim=-1)


def mutual_information(model: nn.Module, pool: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    laplace = blk.LaplaceLoRA(model, curvature="exact").fit([(inputs, labels)], progress=False)
    laplace.optimize_prior_precision()
    probs = laplace.predict((pool, None), differences=True).sample(256).softmax(dim=-1)
    return torch.special.entr(probs.mean(dim=0)).sum(dim=-1) - torch.special.entr(probs).sum(dim=-1).mean(dim=0)


SCORES: dict[str, Score] = {
    "random choice": random_choice,
    "entropy": entropy,
    "mutual information": mutual_information,
}


def train(inputs: Tensor, labels: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def learn(score: Score, images: Tensor, digits: Tensor, seed: int) -> list[float]:
    """The accuracy on the test set at each number of labels."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    pool, test = order[:POOL], order[POOL:]
    chosen, curve = pool[: COUNTS[0]], []
    for _ in COUNTS:
        model = train(images[chosen], digits[chosen], seed)
        with torch.no_grad():
            curve.append(float((model(images[test]).argmax(dim=-1) == digits[test]).double().mean()))
        scores = score(model, images[pool], images[chosen], digits[chosen])
        scores[torch.isin(pool, chosen)] = -torch.inf
        chosen = torch.cat([chosen, pool[scores.topk(COUNTS.step).indices]])
    return curve


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    images, digits = (torch.tensor(column) for column in load_digits(return_X_y=True))
    images = (images / 16).float()
    curves = {}
    print(f"{'labels':20}" + "".join(f"{count:>15}" for count in COUNTS))
    for name, score in SCORES.items():
        curves[name] = [learn(score, images, digits, seed) for seed in range(args.seeds)]
        values = torch.tensor(curves[name])
        mean, error = values.mean(dim=0), values.std(dim=0) / args.seeds**0.5
        print(
            f"{name:20}" + "".join(f"{f'{m:.3f} ± {e:.3f}':>15}" for m, e in zip(mean, error, strict=True)), flush=True
        )
    if args.json:
        args.json.write_text(json.dumps({"labels": list(COUNTS), "accuracy": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()
