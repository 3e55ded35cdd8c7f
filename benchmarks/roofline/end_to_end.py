"""What a batch of a fit and of a prediction adds to the passes of a 7B-shaped Llama: everything that is launched beside
them, as `benchmarks.passes` sees it on the meta device, at the prices of `estimate.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .estimate import Time, times
from .gpus import GPU
from .steps import META, Memory, Step, watching

EXAMPLES, TOKENS, CLASSES, RANK = 8, 256, 4, 8
ADAPTED: dict[str, str | list[str]] = {"q and v": ["q_proj", "v_proj"], "all linear maps": "all-linear"}


@dataclass(frozen=True)
class Added:
    """The steps beside ``passes`` forward and backward passes, which alone take ``model`` seconds."""

    steps: list[Time]
    passes: int
    model: float

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.steps)


def offered() -> bool:
    """Whether this version can watch whole fits."""
    return importlib.util.find_spec("benchmarks.passes") is not None


def llama(adapted: str | list[str], layers: int = 32) -> torch.nn.Module:
    """With LoRA in memory that nobody touches, so that it takes none."""
    import peft
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=layers, attn_implementation="eager")  # of 7B otherwise
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(config).bfloat16()
        model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, target_modules=adapted, task_type="CAUSAL_LM"))
    return model.to_empty(device="cpu")  # type: ignore[no-any-return]


def pass_seconds(model: torch.nn.Module, gpu: GPU) -> float:
    """Of one pass in one direction: two operations for each weight and token, at the rate of the matmul."""
    weights = sum(one.numel() for name, one in model.named_parameters() if one.dim() == 2 and "embed" not in name)
    return 2 * weights * EXAMPLES * TOKENS / gpu.tensor


def added(adapted: str | list[str], gpu: GPU, layers: int = 32) -> dict[str, Added]:
    """By what is run: the second batch of a fit by K-FAC with a sampled label; a prediction that is not the first."""
    import bayesian_lora_kernels as blk
    from bayesian_lora_kernels.config import LaplaceConfig
    from bayesian_lora_kernels.curvature.passes import Passes, fit_curvature
    from bayesian_lora_kernels.model.batches import Batch
    from bayesian_lora_kernels.model.forward import Forward
    from bayesian_lora_kernels.posterior.curvature import CURVATURES
    from bayesian_lora_kernels.posterior.posterior import Posterior
    from bayesian_lora_kernels.posterior.prior import Prior
    from bayesian_lora_kernels.predictive.logits import LogitPredictor

    model, ids, budget = llama(adapted, layers), list(range(CLASSES)), 2**40
    one_pass = pass_seconds(model, gpu)
    found = blk.LaplaceLoRA(model, class_token_ids=ids, check="off", memory_budget=budget).layers
    model.to(META)
    ones = torch.ones(EXAMPLES, TOKENS, dtype=torch.long)
    batch = {"input_ids": ones, "attention_mask": ones, "labels": torch.zeros(EXAMPLES, dtype=torch.long)}
    config = LaplaceConfig(curvature="kfac", fisher="mc", check="off", memory_budget=budget)
    forward = Forward(model, None, ids, CURVATURES[config.curvature].masked, "off")

    def fit(batches: int) -> Any:
        return fit_curvature(Passes(model, found, forward, [batch] * batches, config)).curvature

    _, first = _watched(lambda: fit(1), gpu)
    curvature, both = _watched(lambda: fit(2), gpu)
    posterior = Posterior(curvature, Prior(torch.ones((), dtype=torch.float64)))
    of_logits = Forward(model, None, ids, check="off")
    predictor = LogitPredictor(model, found, of_logits, posterior.curvature.whole_jacobians, budget)

    def predict() -> None:
        predictor.predict(Batch.of(batch, META, labels=False), None, [posterior])

    _watched(predict, gpu)
    return {
        "fit": Added(_difference(times(*both, gpu), times(*first, gpu)), 2, 2 * one_pass),
        "predict": Added(times(*_watched(predict, gpu)[1], gpu), 1 + CLASSES, (1 + CLASSES) * one_pass),
    }


def _watched(run: Callable[[], Any], gpu: GPU) -> tuple[Any, tuple[list[Step], Memory]]:
    passes = importlib.import_module("benchmarks.passes")
    with passes.recording() as recorder:
        watched = watching(gpu.architecture, gpu.multiprocessors, paused=lambda: bool(recorder.paused))
        with watched as (steps, memory):
            result = run()
        return result, (list(steps), memory)


def _difference(longer: list[Time], shorter: list[Time]) -> list[Time]:
    """What the longer run has more, step by step of each name."""
    left = {name: [one for one in shorter if one.name == name] for name in {one.name for one in shorter}}
    found = []
    for one in longer:
        if left.get(one.name):
            left[one.name].pop()
        else:
            found.append(one)
    return found
