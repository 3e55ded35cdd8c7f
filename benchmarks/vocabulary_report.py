"""What the posterior over a whole vocabulary costs, and how much its estimates are worth.

`python -m benchmarks.vocabulary_report` measures memory and time at V = 128,256; with `--folder FOLDER`, which
`python -m benchmarks.vocabulary_model FOLDER` has written, also which estimators pay. `--json FILE` writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from bayesian_lora_kernels import LaplaceLoRA, VocabularyPosterior
from bayesian_lora_kernels.model.hidden import differentiable_attention
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.predictive.hidden_samples import Deviations
from bayesian_lora_kernels.predictive.sampled_logits import SampledLogits

from .peak_memory import measurable, peak_bytes
from .workload import environment

MIB = 2**20


def best(call: Callable[[], Any], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def large(vocabulary: int, width: int) -> LaplaceLoRA:
    """A random Llama's posterior; the curvature is of a few choices, which does not matter here."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    ids = torch.randint(0, vocabulary, (4, 16))
    laplace = LaplaceLoRA(model, class_token_ids=[1, 2, 3])
    laplace.fit([{"input_ids": ids, "labels": torch.randint(0, 3, (4,))}], progress=False)
    laplace.predict({"input_ids": ids[:2, :4]}, outputs="vocabulary").probs(4)  # loads what loads late
    laplace.score({"input_ids": ids[:2, :4]}, 4)
    return laplace


def costs(vocabulary: int, examples: int, samples: int, width: int) -> dict[str, float]:
    """Peak memory as multiples of the `[N, V]` result, and seconds beside plain PyTorch with `[N, S, V]`."""
    laplace = large(vocabulary, width)
    posterior = laplace.predict({"input_ids": torch.randint(0, vocabulary, (examples, 16))}, outputs="vocabulary")
    unit = examples * vocabulary * 4
    result: dict[str, float] = {"result MiB": unit / MIB, "head MiB": vocabulary * width * 4 / MIB}
    result["[N, S, V] MiB"] = samples * unit / MIB
    calls: dict[str, Callable[[], Any]] = {
        "probs": lambda: posterior.probs(samples),
        "statistics": lambda: posterior.statistics(None, samples),
        "variance": lambda: posterior.variance(samples),
    }
    if measurable():
        for name, call in calls.items():
            result[f"{name}: peak / result"] = peak_bytes(call) / unit
        for tokens in (128, 512):
            text = {"input_ids": torch.randint(0, vocabulary, (1, tokens))}
            peak = peak_bytes(lambda text=text: laplace.score(text, samples))  # type: ignore[misc]
            result[f"score of {tokens} tokens: peak MiB"] = peak / MIB
            result[f"{tokens} V numbers, MiB"] = tokens * vocabulary * 4 / MIB
    posterior.variance(samples)
    kept = posterior._kept
    assert kept is not None
    delta = kept.hidden[: samples // 2].transpose(0, 1)
    hidden = posterior.hidden[:, None] + torch.cat([delta, -delta], dim=1)
    weight = posterior._head.weight

    def plain() -> Tensor:
        return (hidden @ weight.mT).softmax(dim=-1).mean(dim=1)

    def plain_statistics() -> Tensor:
        p = (hidden @ weight.mT).softmax(dim=-1)
        return torch.special.entr(p.mean(dim=1)).sum(dim=-1) - torch.special.entr(p).sum(dim=-1).mean(dim=1)

    assert torch.allclose(plain(), posterior.probs(samples), atol=1e-6)
    for name, call, other in (
        ("probs", calls["probs"], plain),
        ("statistics", calls["statistics"], plain_statistics),
        ("variance", calls["variance"], lambda: (kept.hidden.transpose(0, 1) @ weight.mT).square().mean(dim=1)),
    ):
        ours, theirs = zip(*((best(call, 1), best(other, 1)) for _ in range(3)), strict=True)
        result[f"{name}: seconds"] = min(ours)
        result[f"{name}: over materialised"] = min(ours) / min(theirs)
    return result


def estimators(folder: Path, truth_samples: int = 4096, repeats: int = 24) -> dict[str, float]:
    """Errors of estimators that cost the same number of derivatives, against many samples."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    laplace = LaplaceLoRA.from_pretrained(model, folder / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    ids = tokenizer((folder / "text.txt").read_text(encoding="utf-8"))["input_ids"]
    batch = {"input_ids": torch.tensor([ids[start : start + 24] for start in range(0, 48, 6)])}
    posterior = laplace.predict(batch, outputs="vocabulary")
    sampler, weight = posterior._sampler, posterior._head.weight
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    pool = sampler.draw(posterior._batch, truth_samples, False, generator)
    result = {"seconds per sample": (time.perf_counter() - started) / truth_samples}
    result["seconds per exact token"] = best(lambda: posterior.covariance(torch.arange(16)), 2) / 16

    def logits(part: Deviations, n: int, mirrored: bool) -> SampledLogits:
        return SampledLogits(posterior._head, posterior.hidden, part, n, mirrored)

    # Truths. The hidden covariance comes exactly from that of d tokens with independent rows.
    whole = logits(pool, 2 * truth_samples, True)
    mean = whole.probs()
    information = whole.statistics(None).mutual_information
    result["mutual information"] = float(information.mean())
    d = weight.shape[1]
    spread = torch.linspace(0, len(weight) - 1, 2 * d).long()
    rows = weight[spread].double()
    inverse = torch.linalg.pinv(rows)
    covariance = inverse @ posterior.covariance(spread).double() @ inverse.mT  # [N, d, d]
    wide = weight.double()
    variance = torch.einsum("vd,nde,ve->nv", wide, covariance, wide)
    values = torch.linalg.eigvalsh(covariance).flip(1)
    for m in (8, 16, 32, 64):
        result[f"share of the trace in {m} of {d} directions"] = float((values[:, :m].sum(1) / values.sum(1)).mean())

    def batches(n: int) -> list[Deviations]:
        return [Deviations(pool.hidden[i * n : (i + 1) * n], {}) for i in range(repeats)]

    def probs_error(parts: list[Deviations], n: int, mirrored: bool) -> tuple[float, float]:
        found = [logits(part, n, mirrored) for part in parts]
        total = torch.stack([(f.probs() - mean).abs().sum(dim=1) / 2 for f in found])
        info = torch.stack([f.statistics(None).mutual_information / information - 1 for f in found])
        return float(total.mean()), float(info.square().mean().sqrt())

    sobol = [sobol_samples(laplace, posterior, 32, seed) for seed in range(repeats)]
    for name, parts, n, mirrored in (
        ("32 derivatives, independent", batches(32), 32, False),
        ("32 derivatives, mirrored", batches(32), 64, True),
        ("32 derivatives, Sobol", sobol, 32, False),
        ("32 derivatives, Sobol and mirrored", sobol, 64, True),
        ("64 derivatives, independent", batches(64), 64, False),
    ):
        total, info = probs_error(parts, n, mirrored)
        result[f"probs, total variation: {name}"] = total
        result[f"information, relative error: {name}"] = info

    top = posterior.mean.topk(16, dim=1).indices
    estimates: dict[str, list[Tensor]] = {}
    for part in batches(64):
        estimates.setdefault("64 samples", []).append(plain_variance(part.hidden, wide))
        fewer = part.hidden[:48]
        regressed = regressed_variance(fewer, wide, top, covariance)
        estimates.setdefault("16 exact tokens regressed on, 48 samples", []).append(regressed)
        estimates.setdefault("16 directions deflated exactly, 16 + 16 samples", []).append(
            deflated_variance(part.hidden[:32], wide, covariance, 16)
        )
    for part in batches(32):
        points = plain_variance(part.hidden, wide)
        estimates.setdefault("32 samples", []).append(points)
    estimates["32 samples, Sobol"] = [plain_variance(part.hidden, wide) for part in sobol]
    for name, found in estimates.items():
        error = torch.stack(found) / variance - 1
        result[f"variance, relative error: {name}"] = float(error.square().mean().sqrt())
    return result


def plain_variance(delta: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("snd,vd->snv", delta.double(), weight).square().mean(dim=0)


def regressed_variance(delta: Tensor, weight: Tensor, top: Tensor, covariance: Tensor) -> Tensor:
    """Gaussian regression on tokens whose joint covariance is known (the maximum likelihood with that margin)."""
    delta = delta.double().transpose(0, 1)  # [N, S, d]
    known = weight[top]  # [N, K, d]
    z = delta @ known.mT
    slopes = torch.linalg.lstsq(z, delta).solution  # [N, K, d]
    rest = delta - z @ slopes
    s, k = z.shape[1:]
    exact = known @ covariance @ known.mT
    spread = rest.mT @ rest / (s - k)
    gain = (exact @ torch.linalg.inv(z.mT @ z)).diagonal(dim1=1, dim2=2).sum(dim=1)
    total = slopes.mT @ exact @ slopes + (1 - gain)[:, None, None] * spread
    return torch.einsum("vd,nde,ve->nv", weight, total, weight)


def deflated_variance(delta: Tensor, weight: Tensor, covariance: Tensor, m: int) -> Tensor:
    """Exact in the span of the first m samples (m backward passes and m derivatives), the others for the rest of it."""
    delta = delta.double().transpose(0, 1)
    basis = torch.linalg.qr(delta[:, :m].mT)[0]  # [N, d, m]
    outside = torch.eye(basis.shape[1], dtype=basis.dtype) - basis @ basis.mT
    rest = delta[:, m:] @ outside
    total = covariance - outside @ covariance @ outside + rest.mT @ rest / rest.shape[1]
    return torch.einsum("vd,nde,ve->nv", weight, total, weight)


def sobol_samples(laplace: LaplaceLoRA, posterior: VocabularyPosterior, n: int, seed: int) -> Deviations:
    """Weights from a scrambled Sobol sequence over all of them instead of independent noise."""
    layers = laplace.posterior
    sizes = [math.prod(p.shape) for p in layers.values()]
    if sum(sizes) > torch.quasirandom.SobolEngine.MAXDIM:
        raise ValueError(f"{sum(sizes)} weights are more than a Sobol sequence has dimensions")
    points = torch.quasirandom.SobolEngine(sum(sizes), scramble=True, seed=seed).draw(n, dtype=torch.float64)
    noise = torch.special.ndtri(points.clamp(1e-12, 1 - 1e-12)).float().split(sizes, dim=1)
    weights = {
        name: p.apply(torch.rsqrt, part.reshape(n, *p.shape))
        for (name, p), part in zip(layers.items(), noise, strict=True)
    }
    sampler = posterior._sampler
    with measuring(sampler.model), differentiable_attention(sampler.model), torch.no_grad():
        return sampler._push(posterior._batch, weights, *sampler._shape(posterior._batch), False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of benchmarks.vocabulary_model: compare estimators on it")
    parser.add_argument("--width", type=int, default=64, help="of the random model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment()}
    sizes = {"vocabulary": 128_256, "examples": 16, "samples": 64, "width": arguments.width}
    result["costs"] = sizes | costs(**sizes)
    if arguments.folder is not None:
        result["estimators"] = estimators(arguments.folder)
    for part in ("costs", "estimators"):
        for name, value in result.get(part, {}).items():
            print(f"{name:60} {value:.4g}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
