"""A small causal LM with LoRA, made on the spot: which of four sources does a sequence of tokens come from?

Sources are Markov chains over 12 tokens. The answer is one of four more tokens, after the sequence, among all 16. The
base model learns this of other sources; the adapter learns four new ones from 200 examples, some of them mislabelled.
It is trained to the minimum of the sum of the losses and `PRIOR / 2` times its squared weights, by full batches from one
start, so that training depends on nothing but the examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

TOKENS, SOURCES, LENGTH = 12, 4, 10
VOCABULARY = TOKENS + SOURCES
TRAIN, QUERIES = 160, 100
NEW = 0.4  # the share of the adapter's sources that the base model has not seen
MISLABELLED = 0.1
PRIOR = 1.0
ITERATIONS = 80
BASE_STEPS, BASE_BATCH = 300, 64

Data = tuple[Tensor, Tensor]  # input_ids [N, T], answers [N]


def sources(new: float) -> Tensor:
    """Transition probabilities `[SOURCES, TOKENS, TOKENS]`: the base model's, in another order, and a share of others."""
    old, other = (
        (1.5 * torch.randn(SOURCES, TOKENS, TOKENS, generator=torch.Generator().manual_seed(seed))).softmax(dim=-1)
        for seed in (1, 2)
    )
    return (1 - new) * old.roll(1 if new else 0, dims=0) + new * other


def draw(chains: Tensor, n: int, seed: int, mislabelled: float = 0.0) -> Data:
    """Sequences and answers."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(SOURCES, (n,), generator=generator)
    tokens = [torch.randint(TOKENS, (n,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(chains[source, tokens[-1]], 1, generator=generator).squeeze(1))
    other = torch.randint(SOURCES, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < mislabelled
    return torch.stack(tokens, dim=1), TOKENS + torch.where(wrong, other, source)


def train_data() -> Data:
    """What the adapter is trained on."""
    return draw(sources(NEW), TRAIN, 2, MISLABELLED)


def query_data() -> Data:
    """What influence is asked about."""
    return draw(sources(NEW), QUERIES, 3)


def answer_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """`[N, VOCABULARY]` after the last token."""
    logits: Tensor = model(input_ids=ids).logits[:, -1]
    return logits


def losses(model: nn.Module, data: Data) -> Tensor:
    """`[N]`."""
    return nn.functional.cross_entropy(answer_logits(model, data[0]), data[1], reduction="none")


def adapter(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def untrained() -> nn.Module:
    """The base model, trained here on other sources, and an adapter at its start."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        initializer_range=0.1,
        pad_token_id=0,
    )
    base = transformers.LlamaForCausalLM(config)
    optimiser = torch.optim.Adam(base.parameters(), lr=3e-3)
    for step in range(BASE_STEPS):
        loss = losses(base, draw(sources(0.0), BASE_BATCH, 1000 + step)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    torch.manual_seed(1)
    return peft.get_peft_model(base, settings).eval()


def train(model: nn.Module, start: Sequence[Tensor], data: Data) -> float:
    """Train the adapter from `start`; the norm of the gradient at the end, over that of its two parts at a typical one."""
    parameters = adapter(model)
    with torch.no_grad():
        for p, value in zip(parameters, start, strict=True):
            p.copy_(value)
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe", tolerance_change=0.0
    )

    def closure() -> float:
        optimiser.zero_grad()
        loss = objective(model, data)
        loss.backward()
        return float(loss.detach())

    optimiser.step(closure)
    gradient = torch.autograd.grad(objective(model, data), parameters)
    norm = sum(float(g.square().sum()) for g in gradient) ** 0.5
    scale = PRIOR * sum(float(p.detach().square().sum()) for p in parameters) ** 0.5
    return norm / scale


def objective(model: nn.Module, data: Data) -> Tensor:
    """Minus the logarithm of the posterior, but for a constant."""
    return losses(model, data).sum() + 0.5 * PRIOR * sum(p.square().sum() for p in adapter(model))


def load(folder: Path) -> nn.Module:
    """The model that was trained on all of the data."""
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter", is_trainable=True
    )
    return model.eval()
