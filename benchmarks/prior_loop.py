"""What it costs to optimise a prior over a loaded posterior, and to predict: `python -m benchmarks.prior_loop`.

Only the public interface is called: with PYTHONPATH set to another version's sources it times that one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import peft
import torch
import transformers

import bayesian_lora_kernels as blk

LAYERS, WIDTH, IDS, STEPS = 8, 32, [2, 5, 7], 60


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def median(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[3:])


def times(laplace: blk.LaplaceLoRA, batch: dict[str, torch.Tensor], modules: list[str] | None) -> list[float]:
    """Milliseconds of a step of the optimiser and of a prediction; with one precision for all modules, or one each."""
    logs = torch.zeros(() if modules is None else len(modules), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logs], lr=0.05)

    def prior() -> dict[str, torch.Tensor] | torch.Tensor:
        return logs.exp() if modules is None else dict(zip(modules, logs.exp().unbind(), strict=True))

    def step() -> None:
        optimizer.zero_grad()
        (-laplace.log_marginal_likelihood(prior())).backward()
        optimizer.step()

    found = [median(step, STEPS)]
    with torch.no_grad():
        laplace.prior_precision = prior()
    return [*found, median(lambda: laplace.predict(batch), STEPS // 2)]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = build()
    batches = [{"input_ids": torch.randint(1, 64, (8, 6)), "labels": torch.randint(0, 3, (8,))} for _ in range(4)]
    two = {"input_ids": batches[0]["input_ids"][:2]}
    print(f"{blk.__file__}\nmedian ms    one precision: step, prediction   one for each module: step, prediction")
    for curvature in ("kfac", "ekfac", "exact"):
        with tempfile.TemporaryDirectory() as folder:
            fitted = blk.LaplaceLoRA(model, class_token_ids=IDS, curvature=curvature).fit(batches, progress=False)
            fitted.save_pretrained(folder)
            laplace = blk.LaplaceLoRA.from_pretrained(model, folder)
        modules = sorted({name.rpartition(".")[0] for name in laplace.sample_weights(1)})
        row = times(laplace, two, None) + times(laplace, two, modules)
        print(f"{curvature:22}" + "".join(f"{value:12.2f}" for value in row))


if __name__ == "__main__":
    main()
