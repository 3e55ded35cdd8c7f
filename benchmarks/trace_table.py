"""Trace of the summed curvature, by every package: `python -m benchmarks.trace_table [--json FILE]`.

A random 2-layer Llama of width 32, LoRA of rank 4 on q and v, 12 texts of 10 tokens, 3 target logits; without padding,
and with 10 columns of it on the left. The truth is the trace of the exact Gauss-Newton matrix, from autograd. A peer
that is not there is left out; laplace-lora and BayesAdapt are checkouts in the folder that `--sources` (or
BLK_PEER_SOURCES) names.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from .workload import environment

ROOT = Path(__file__).parents[1]
EXAMPLES, TOKENS, PADS, IDS = 12, 10, 10, [3, 5, 8]
CHECKOUTS = {"laplace-lora": "laplace", "BayesAdapt": "bayesadapt.laplace"}  # {folder: module with `Laplace`}
SAMPLES = 200  # bayesian_lora draws one target per example: its trace is a mean over this many passes


class Wrapped(nn.Module):
    """Keywords or one mapping in, the last position's logits of the target tokens out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, data: Mapping[str, Tensor] | None = None, **kwargs: Tensor) -> Tensor:
        inputs = {key: value for key, value in (data or kwargs).items() if key != "labels"}
        return self.model(**inputs).logits[:, -1, IDS]


def toy() -> nn.Module:
    """The model, with an adapter of which no part is zero."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return Wrapped(model.eval())


def batch(pads: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (EXAMPLES, TOKENS), generator=generator)
    labels = torch.randint(len(IDS), (EXAMPLES,), generator=generator)
    padding = torch.zeros(EXAMPLES, pads, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    return {"input_ids": torch.cat([padding, ids], dim=1), "attention_mask": mask, "labels": labels}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The batch, example by example."""

    def __init__(self, whole: Mapping[str, Tensor]):
        self.whole = whole

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[i] for key, value in self.whole.items()}


def loader(pads: int, size: int = EXAMPLES) -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    return torch.utils.data.DataLoader(Rows(batch(pads)), batch_size=size)


def exact(model: nn.Module, whole: Mapping[str, Tensor] | None = None) -> float:
    """Sum over examples of the squared norms of `J^T L`, with `L L^T = diag(p) - p p^T`; of `batch(0)`, or another."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits, total = model(**(batch(0) if whole is None else whole)), 0.0
    probs = logits.detach().softmax(dim=-1)
    columns = torch.diag_embed(probs.sqrt()) - probs[:, :, None] * probs.sqrt()[:, None, :]
    for n, c in itertools.product(range(len(logits)), range(logits.shape[1])):
        gradients = torch.autograd.grad(logits[n] @ columns[n, :, c], parameters, retain_graph=True)
        total += sum(float(g.square().sum()) for g in gradients)
    return total


def kron_trace(kron: Any) -> float:
    return sum(float(torch.stack([f.trace() for f in factors]).prod()) for factors in kron.kfacs)


def laplace_lora(checkout: str, model: nn.Module, pads: int) -> float:
    la = importlib.import_module(CHECKOUTS[checkout]).Laplace(
        model, "classification", prior_precision=1.0, subset_of_weights="all", hessian_structure="kron"
    )
    la.fit(loader(pads, size=4))
    return kron_trace(la.H_facs)


def bayesian_lora(model: nn.Module, size: int, low_rank: bool) -> float:
    from bayesian_lora import calculate_kronecker_factors

    settings = {"n_kfac": 10, "lr_threshold": 16} if low_rank else {}
    total = 0.0
    for seed in range(SAMPLES):
        torch.manual_seed(seed)
        factors = calculate_kronecker_factors(
            model, lambda m, b: m(b), list(loader(0, size)), target_module_keywords=["lora"], **settings
        )
        for pair in factors.values():
            traces = [f.trace() if f.shape[0] == f.shape[1] else f.square().sum() for f in pair]
            total += float(traces[0] * traces[1])
    model.zero_grad()
    return total / SAMPLES


def rows(sources: str | None) -> tuple[dict[str, float], dict[str, str]]:
    """`{row: trace}`, and `{package: why it is left out}`."""
    from bayesian_lora_kernels import LaplaceLoRA
    from bayesian_lora_kernels.compat.laplace_lora import Laplace

    found: dict[str, float] = {}
    left_out: dict[str, str] = {}
    found["exact Gauss-Newton"] = exact(toy())
    for pads in (0, PADS):
        suffix = f", {pads} pads" if pads else ""
        for curvature in ("kfac", "ekfac"):
            laplace = LaplaceLoRA(toy(), lambda m, b: m(b), curvature=curvature, rank=None)
            laplace.fit(list(loader(pads, size=5)), progress=False)
            spectra = [layer.spectrum() for layer in laplace.posterior.values()]
            trace = sum(float((values * multiplicity).sum()) for values, multiplicity in spectra)
            found[f"ours, {curvature}, batches of 5{suffix}"] = trace
        published = Laplace(toy(), "classification", scale="published")
        published.fit(list(loader(pads, size=4)))
        found[f"compat.laplace_lora, published scale{suffix}"] = sum(
            float(f.trace()) for f in published.engine.factors.values()
        )
    if find_spec("laplace"):
        from laplace.curvature import CurvlinopsGGN

        from bayesian_lora_kernels.compat.laplace_torch import BlkGGN

        for pads in (0, PADS):
            suffix = f", {pads} pads" if pads else ""
            for name, backend in (("laplace-torch, CurvlinopsGGN", CurvlinopsGGN), ("compat.laplace_torch", BlkGGN)):
                whole = batch(pads)
                _, kron = backend(toy(), "classification").kron(whole, whole["labels"], N=EXAMPLES)
                found[f"{name}{suffix}"] = kron_trace(kron)
    else:
        left_out["laplace-torch"] = "not installed"
    for name in CHECKOUTS:
        if find_spec("asdl") and sources and (Path(sources) / name).is_dir():
            for pads in (0, PADS):
                found[name + (f", {pads} pads" if pads else "")] = _in_its_own_process(sources, pads, name)
        else:
            left_out[name] = "no checkout in --sources, or asdl is not installed"
    if find_spec("bayesian_lora"):
        found["bayesian_lora, full rank, times N"] = EXAMPLES * bayesian_lora(toy(), EXAMPLES, low_rank=False)
        for size in (12, 6, 4):
            found[f"bayesian_lora, low rank, batches of {size}"] = bayesian_lora(toy(), size, low_rank=True)
    else:
        left_out["bayesian_lora"] = "not installed"
    return found, left_out


def _in_its_own_process(sources: str, pads: int, checkout: str = "laplace-lora") -> float:
    path = os.pathsep.join([str(Path(sources) / checkout), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trace_table", "--checkout", checkout, str(pads)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace_table", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--sources", default=os.environ.get("BLK_PEER_SOURCES"), metavar="FOLDER")
    parser.add_argument("--checkout", nargs=2, metavar=("NAME", "PADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.checkout is not None:
        checkout, pads = arguments.checkout
        print(laplace_lora(checkout, toy(), int(pads)))
        return
    found, left_out = rows(arguments.sources)
    truth = found["exact Gauss-Newton"]
    print(f"{'':52}{'trace':>12}{'/ exact':>10}")
    for name, value in found.items():
        print(f"{name:52}{value:>12.4g}{value / truth:>10.3f}")
    for name, reason in left_out.items():
        print(f"{name}: left out, {reason}")
    if arguments.json:
        content = {"environment": environment(), "traces": found, "left_out": left_out}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
