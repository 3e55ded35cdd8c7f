"""`blk inspect`, and how many parameters the data determine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bayesian_lora_kernels import LaplaceLoRA, Posterior, Prior
from bayesian_lora_kernels.cli import main
from bayesian_lora_kernels.commands.inspect import kinds
from bayesian_lora_kernels.plots.posterior import spectrum_line
from bayesian_lora_kernels.posterior import storage
from bayesian_lora_kernels.posterior.evidence import effective_parameters

CURVATURES = ("kfac", "ekfac", "exact")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 5)
        self.down = nn.Linear(5, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def fitted(curvature: str) -> LaplaceLoRA:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(4) for _ in range(3)), nn.Linear(4, 3)).double()
    x = torch.randn(12, 4, dtype=torch.float64)
    return LaplaceLoRA(model, curvature=curvature).fit([(x, torch.arange(12) % 3)], progress=False)


def dense(laplace: LaplaceLoRA) -> dict[str, torch.Tensor]:
    """The curvature of each layer, or of all under `""`: from unit priors' covariances."""
    posterior = Posterior(laplace.posterior.curvature, Prior(1.0))
    curvature = posterior.curvature
    if curvature.independent_layers:
        return {n: posterior[n].to_dense() - torch.eye(p).double() for n, p in curvature.n_parameters.items()}
    rows = torch.cat([curvature.store.rows(name) for name in curvature.shapes], dim=1)  # type: ignore[attr-defined]
    return {"": rows.mT @ rows}


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("per_module", [False, True])
def test_effective_parameters_are_those_of_the_dense_matrix(curvature: str, per_module: bool) -> None:
    laplace = fitted(curvature)
    counts = laplace.posterior.curvature.n_parameters
    precisions = {name: 0.3 * (1 + per_module * i) for i, name in enumerate(counts)}
    found = effective_parameters(Posterior(laplace.posterior.curvature, Prior(precisions)))
    matrices = dense(laplace)
    assert found.keys() == matrices.keys()
    for name, matrix in matrices.items():
        each = [precisions[n] for n in counts if name in ("", n) for _ in range(counts[n])]
        prior = torch.tensor(each, dtype=torch.float64)
        expected = len(prior) - (prior * torch.linalg.inv(matrix + prior.diag()).diagonal()).sum()
        assert found[name] == pytest.approx(float(expected), rel=1e-8)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_at_the_best_prior_square_weights_count_the_parameters(curvature: str) -> None:
    """MacKay's condition: lambda ||theta||^2 is the effective number of parameters where the evidence is largest."""
    laplace = fitted(curvature).optimize_prior_precision()
    weights = sum(float(layer.matrix().square().sum()) for layer in laplace.layers)
    precision = float(laplace.prior_precision)  # type: ignore[arg-type]
    assert sum(effective_parameters(laplace.posterior).values()) == pytest.approx(precision * weights, rel=1e-3)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_command(curvature: str, tmp_path: Path, capsys: Any) -> None:
    laplace = fitted(curvature).optimize_prior_precision()
    laplace.prior_precision = 2 * float(laplace.prior_precision)  # type: ignore[arg-type]
    laplace.save_pretrained(tmp_path)
    picture, file = tmp_path / "picture.png", tmp_path / "result.json"
    assert main(["inspect", str(tmp_path), "--plot", str(picture), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["n_parameters"] == sum(laplace.posterior.curvature.n_parameters.values())
    assert result["effective_parameters"] == pytest.approx(sum(effective_parameters(laplace.posterior).values()))
    evidence = result["evidence"]
    assert evidence["now"] == pytest.approx(float(laplace.log_marginal_likelihood()))
    assert evidence["best"] > evidence["now"]
    assert evidence["best"] >= max(evidence["log_evidence"])
    assert [kind["kind"] for kind in result["kinds"]] == ["up", "down", "layers"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{evidence['best']:.2f}" in printed
    assert str(picture) in printed


def test_a_posterior_without_norms_has_no_evidence(tmp_path: Path, capsys: Any) -> None:
    fitted("kfac").save_pretrained(tmp_path)
    _, content = storage.load(tmp_path)
    for layer in content["layers"].values():
        del layer["square_norm"]
    kept = {key: value for key, value in content.items() if key not in ("format", "version", "sha256", "tensors")}
    storage.save(tmp_path, load_file(tmp_path / content["tensors"]["file"]), kept)
    assert main(["inspect", str(tmp_path), "--plot", str(tmp_path / "picture.svg")]) == 0
    assert "evidence" not in capsys.readouterr().out.replace("spectra, layers and evidence", "")


def test_what_is_no_posterior(tmp_path: Path, capsys: Any) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    fitted("kfac").save_pretrained(tmp_path)
    path = tmp_path / storage.JSON_NAME
    path.write_text(path.read_text().replace('"n_examples": 12', '"n_examples": 13'))
    assert main(["inspect", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "run blk fit first" in lines[0]
    assert "checksum" in lines[1]


def test_a_spectrum_as_a_line() -> None:
    """Each eigenvalue from its first place to its last, the largest first; what rounding leaves of zero is left out."""
    values, counts = torch.tensor([0.5, 3.0, 1e-13, 0.0], dtype=torch.float64), torch.tensor([4, 1, 7, 9])
    assert spectrum_line(values, counts) == ([1, 1, 2, 5], [3.0, 3.0, 0.5, 0.5])


def test_kinds_of_modules() -> None:
    peft = [f"base.layers.{i}.self_attn.{m}.lora_{x}.default" for i in (0, 1) for m in "qv" for x in "AB"]
    assert {kind: len(names) for kind, names in kinds(peft).items()} == {
        "q.lora_A": 2,
        "q.lora_B": 2,
        "v.lora_A": 2,
        "v.lora_B": 2,
    }
    assert kinds(["0", "2"]) == {"layers": ["0", "2"]}
