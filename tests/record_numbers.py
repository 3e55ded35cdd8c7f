"""Whether two versions of the package compute the same, to the last bit: what a fit, a prior, predictions, samples and
files come to on the tests' models.

    PYTHONPATH=OLD python tests/record_numbers.py before     # the package in OLD
    PYTHONPATH=NEW python tests/record_numbers.py after
    python tests/record_numbers.py before after              # prints what differs, and by how much

Only the public interface is called, so that the same script runs against both.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from models import bert, gpt2, llama, mlp, seq2seq
from safetensors.torch import load_file, save_file
from torch import Tensor

import bayesian_lora_kernels as blk

KFAC, EKFAC, EXACT = ({"curvature": kind} for kind in ("kfac", "ekfac", "exact"))
LOW_RANK = {"rank": 3, "rank_threshold": 8}
CASES: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "llama": (llama, [KFAC, EKFAC, EXACT, {**EKFAC, **LOW_RANK}, {**KFAC, "tokens": "reduce"}]),
    "llama float32": (lambda: llama(dtype=torch.float32), [KFAC, EKFAC, EXACT, {**KFAC, **LOW_RANK}]),
    "shared inputs": (lambda: llama(targets=("q_proj", "k_proj", "v_proj")), [KFAC]),
    "adapted head": (lambda: llama(targets=("v_proj", "lm_head")), [KFAC, EXACT]),
    "gpt2": (gpt2, [EKFAC]),
    "bert": (bert, [KFAC, EKFAC, EXACT]),
    "encoder-decoder": (seq2seq, [KFAC, EXACT]),
    "plain": (lambda: mlp(n=9, width=24, inputs=20), [{**KFAC, **LOW_RANK}, {**EKFAC, **LOW_RANK}]),
    "plain float32": (lambda: mlp(n=9, tokens=3, dtype=torch.float32), [KFAC, EKFAC, EXACT, {**KFAC, "fisher": "mc"}]),
    "more rows than weights": (lambda: mlp(n=9, trainable=["last.bias"]), [EXACT]),
    "rows in bfloat16": (lambda: mlp(dtype=torch.float32), [{**EXACT, "row_dtype": torch.bfloat16}]),
    "regression": (lambda: mlp(classes=1), [KFAC, EXACT]),
}


def record(folder: Path) -> None:
    folder.mkdir(parents=True)
    found: dict[str, Tensor] = {}
    for name, (build, settings) in CASES.items():
        for i, setting in enumerate(settings):
            torch.manual_seed(0)
            case = build()
            laplace = blk.LaplaceLoRA(case.model, **{**case.arguments, **setting})
            laplace.fit(case.loader(2), progress=False)
            for key, value in numbers(laplace, case, folder / f"{name} {i}"):
                found[f"{name} {i}: {key}"] = value.detach().clone().contiguous()
            print(f"{name}: {setting}", file=sys.stderr)
    save_file(found, folder / "numbers.safetensors")


def numbers(laplace: blk.LaplaceLoRA, case: Any, folder: Path) -> Iterator[tuple[str, Tensor]]:
    batch, names = case.batch(), list(laplace.sample_weights(1))
    modules = sorted({name.rpartition(".")[0] for name in names})
    priors: dict[str, Any] = {"global": 0.3, "by module": {m: 0.2 + 0.1 * i for i, m in enumerate(modules)}}
    yield "log-likelihood", torch.tensor(laplace.log_likelihood, dtype=torch.float64)
    for kind, prior in priors.items():
        laplace.prior_precision = prior
        for repeat in range(2):
            prediction = laplace.predict(batch)
            yield f"{kind}: mean {repeat}", prediction.mean
            yield f"{kind}: covariance {repeat}", prediction.covariance
        yield f"{kind}: evidence", laplace.log_marginal_likelihood()
        leaves = {m: torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for m in modules}
        given: Any = leaves if kind == "by module" else leaves[modules[0]]
        value = laplace.log_marginal_likelihood(given)
        yield f"{kind}: evidence at 0.7", value
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        yield f"{kind}: its gradient", torch.stack([g for g in grads if g is not None])
        samples = laplace.sample_weights(3, torch.Generator().manual_seed(5))
        for name in names:
            yield f"{kind}: samples of {name}", samples[name]
        if prediction.classification:
            for method in ("probit", "bridge", "map"):
                yield f"{kind}: {method}", prediction.probs(method)
        if laplace.likelihood == "classification" and "class_token_ids" in case.arguments:
            vocabulary = laplace.predict(batch, outputs="vocabulary") if "lm_head" not in str(names) else None
            if vocabulary is not None:
                yield f"{kind}: vocabulary", vocabulary.probs(8, torch.Generator().manual_seed(1))
                yield f"{kind}: vocabulary's covariance", vocabulary.covariance(torch.arange(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, per_module in (("global", False), ("by module", True)):
            laplace.optimize_prior_precision(per_module=per_module)
            best: Any = laplace.prior_precision
            values = [best[m] for m in modules] if isinstance(best, dict) else [best]
            yield f"{kind}: best prior", torch.stack([v.double() for v in values])
            laplace.save_pretrained(folder / kind)
            again = type(laplace).from_pretrained(case.model, folder / kind)
            yield f"{kind}: covariance after loading", again.predict(batch).covariance
        yield "best held-out prior", held_out_prior(laplace, case)


def held_out_prior(laplace: blk.LaplaceLoRA, case: Any) -> Tensor:
    laplace.optimize_prior_precision("nll", val_loader=case.loader(3))
    value: Any = laplace.prior_precision
    return value.double()


def compare(before: Path, after: Path) -> int:
    one, other = (load_file(folder / "numbers.safetensors") for folder in (before, after))
    different = sorted(one.keys() ^ other.keys())
    equal = 0
    for key in sorted(one.keys() & other.keys()):
        if torch.equal(one[key], other[key]):
            equal += 1
            continue
        scale = float(one[key].double().abs().max())
        worst = float((one[key].double() - other[key].double()).abs().max())
        different.append(f"{key}: largest difference {worst:.3g}, of {scale:.3g}")
    for path in sorted(before.glob("*/*/laplace.json")):
        was, now = (json.loads((folder / path.relative_to(before)).read_text()) for folder in (before, after))
        for content in (was, now):
            content.pop("sha256")
        if was == now:
            equal += 1
        else:
            keys = [key for key in was.keys() | now.keys() if was.get(key) != now.get(key)]
            different.append(f"{path.relative_to(before)}: {', '.join(sorted(keys))}")
    print("\n".join(different))
    print(f"{equal} equal to the last bit, {len(different)} not")
    return bool(different)


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    if len(folders) == 2:
        sys.exit(compare(*folders))
    record(*folders)
