"""Best of n answers by a reward model of few pairs: by its mean, or by what it is sure of. Downloads nothing.

The gold reward is known here: the value of each word, less one for each word beyond eight. The reward model sees which
of two answers is better, of pairs of at most eight words; of the answers to choose from one in ten is longer. The more
there are, the likelier is one that the model overrates. A lower confidence bound, mean less k standard deviations, is
wary of those: the deviation grows with the distance from what was compared.

    python examples/best_of_n.py --longer 0    # all answers like those of the pairs: nothing to be wary of
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import bayesian_lora_kernels as blk

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--longer", type=float, default=0.1, help="share of the answers that are longer than those compared"
)
LONGER = parser.parse_args().longer

WORDS, LONGEST, USUAL = 20, 24, 8
PAIRS, QUESTIONS, SEEDS, DECAY = 128, 100, 20, 1.0
CHOICES = (1, 2, 4, 8, 16, 32, 64)  # n
BOUNDS = (0.0, 0.5, 1.0, 2.0)  # k


class RewardModel(nn.Module):
    """Stands for your own: one logit for each text."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.score = nn.Embedding(WORDS + 1, 16), nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden((self.words(input_ids) * attention_mask[..., None]).sum(dim=1) / 4)
        return self.score(torch.tanh(hidden / 2) + 0.3 * hidden)


def answers(*shape: int, longer: float = 0.0) -> torch.Tensor:
    """Words `[*shape, LONGEST]` and zeros behind them: three to eight, or up to 24 in a share of the answers."""
    length = torch.randint(3, USUAL + 1, shape)
    length = torch.where(torch.rand(shape) < longer, torch.randint(USUAL + 1, LONGEST + 1, shape), length)
    return torch.randint(1, WORDS + 1, (*shape, LONGEST)) * (torch.arange(LONGEST) < length[..., None])


def batch(texts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": texts, "attention_mask": (texts > 0).long()}


def gold(texts: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return value[texts].sum(-1) - ((texts > 0).sum(-1) - USUAL).clamp_min(0)


def trained(pairs: dict[str, torch.Tensor]) -> nn.Module:
    model = get_peft_model(RewardModel(), LoraConfig(r=8, target_modules=["hidden"], modules_to_save=["score"]))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    for _ in range(150):
        better, worse = model(**pairs)[:, 0].chunk(2)
        loss = -nn.functional.logsigmoid(better - worse).sum() + DECAY / 2 * sum(p.square().sum() for p in weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def chosen(seed: int) -> torch.Tensor:
    """`[bounds, choices]`, the mean gold reward of the answers that are chosen."""
    torch.manual_seed(seed)
    value = torch.randn(WORDS + 1)
    value[1:] -= value[1:].mean()
    value[0] = 0
    first, second = answers(2, PAIRS)
    turned = (torch.rand(PAIRS) > (gold(first, value) - gold(second, value)).sigmoid())[:, None]
    pairs = batch(torch.cat([torch.where(turned, second, first), torch.where(turned, first, second)]))  # chosen first

    laplace = blk.LaplaceLoRA(trained(pairs), likelihood="bradley-terry", curvature="exact")
    laplace.fit([pairs], progress=False).optimize_prior_precision()
    texts = answers(QUESTIONS, max(CHOICES), longer=LONGER)
    reward = laplace.predict(batch(texts.flatten(0, 1)))
    mean, std = (x.view(QUESTIONS, -1) for x in (reward.mean, reward.variance.sqrt()))
    best = torch.stack([torch.stack([(mean - k * std)[:, :n].argmax(1) for n in CHOICES]) for k in BOUNDS])
    return gold(texts, value).gather(1, best.flatten(0, 1).T).T.view(len(BOUNDS), len(CHOICES), -1).mean(-1)


found = torch.stack([chosen(seed) for seed in range(SEEDS)])  # [seeds, bounds, choices]
print(f"gold reward of the best of n, mean and standard error of {SEEDS} reward models")
print(f"{'n':<14}" + "".join(f"{n:>12}" for n in CHOICES))
for k, curve in zip(BOUNDS, found.unbind(1), strict=True):
    cells = zip(curve.mean(0), curve.std(0) / SEEDS**0.5, strict=True)
    print(f"{f'mean - {k} std' if k else 'mean':<14}" + "".join(f"{m:>6.2f} ±{e:>4.2f}" for m, e in cells))
print(f"gain over the mean, of the same models, at n = {CHOICES[-1]}")
for k, gain in zip(BOUNDS[1:], (found[:, 1:, -1] - found[:, :1, -1]).unbind(1), strict=True):
    print(
        f"mean - {k} std  {gain.mean():.2f} ± {gain.std() / SEEDS**0.5:.2f}, {int((gain > 0).sum())} of {SEEDS} better"
    )
