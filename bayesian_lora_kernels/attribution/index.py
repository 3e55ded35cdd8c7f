"""Training examples as short rows on disk, so that influence on a new query needs no pass over them.

With B a square root of Sigma, the influence of example i on query q is `-<x_q, x_i>`, `x = B^T grad l`. An index keeps
the coordinates of every x_i in the r directions V that hold most of their squares, V itself, and the length of what is
left of each x_i. What truncation does to one score is bounded by the product of the two lengths that are left.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bayesian_lora_kernels import ops
from bayesian_lora_kernels.attribution.order import InOrder
from bayesian_lora_kernels.attribution.scores import budget_of, damped, gradients
from bayesian_lora_kernels.config import PriorPrecision
from bayesian_lora_kernels.model import fingerprint
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.names import adapters_of
from bayesian_lora_kernels.posterior import storage
from bayesian_lora_kernels.posterior.posterior import Posterior
from bayesian_lora_kernels.posterior.tensor_file import TensorFile, values_digest, write_tensors
from bayesian_lora_kernels.posterior.weights import adapter_digest
from bayesian_lora_kernels.surroundings import in_own_surroundings

if TYPE_CHECKING:
    from bayesian_lora_kernels.laplace import LaplaceLoRA

FORMAT, VERSION = "bayesian_lora_kernels.influence", 1
JSON_NAME, TENSORS_NAME = "influence.json", "influence.safetensors"
BASE, ROWS, LEFT = "base_model", "rows", "left"
# Bytes for each weight and column of the basis while that is found: it, its update and both in float64.
STATE_BYTES = 32


class TruncatedScores(NamedTuple):
    """Influence from an index.

    Attributes:
        values: `[Q, N]` float64, as `influence` gives them, but for what truncation leaves out.
        bound: `[Q, N]` float64, which the error of a value does not exceed, but for rounding.
    """

    values: Tensor
    bound: Tensor


class InfluenceIndex:
    """Rows of the training examples of one posterior, in a folder. `build` makes one, `open` reads it.

    Attributes:
        folder: where it is: `influence.json` and `influence.safetensors`.
        rank: r, directions kept; fewer than were asked for if the gradients span fewer.
        n_examples: N.
        kept: the share of the squared lengths of all rows that is in these directions, at most 1.
    """

    def __init__(self, laplace: LaplaceLoRA, folder: Path, content: dict[str, Any], tensors: TensorFile):
        self._laplace, self._tensors = laplace, tensors
        self.folder = folder
        self.rank, self.n_examples, self.kept = content["rank"], content["n_examples"], content["kept"]
        self._posterior = damped(laplace, _own(laplace, content["damping"]))

    @classmethod
    @in_own_surroundings
    def build(
        cls,
        laplace: LaplaceLoRA,
        train_loader: Iterable[Any],
        folder: str | os.PathLike[str],
        rank: int,
        *,
        damping: PriorPrecision | None = None,
        progress: bool = True,
    ) -> InfluenceIndex:
        """Go over the training data twice, for the directions and for the rows, and write them.

        Args:
            laplace: after `fit` on the training data.
            train_loader: labelled batches of N examples, in the order of the columns of scores.
            folder: that does not exist yet; it is there whole afterwards, or not at all. It takes `r (N + P)` numbers
                of single precision (double for a float64 model), P the number of weights.
            rank: r. Memory beside captures: `32 (2 r + 10) P` bytes.
            damping: as for `influence`.
            progress: whether to show a progress bar.

        Raises:
            FileExistsError: if there is something at `folder`.
            ValueError: for a rank below 1, or too large for the memory budget, and as `influence`.
            RuntimeError, TypeError: as `influence`.
            OSError: if it cannot be written.
        """
        folder, posterior = Path(folder), damped(laplace, damping)
        if folder.exists():
            raise FileExistsError(f"{folder}: exists; expected a folder that is to be made")
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank: expected a positive int, got {rank!r}")
        per_column = STATE_BYTES * sum(posterior.curvature.n_parameters.values())
        most = (budget_of(laplace) // per_column - 10) // 2
        if not 1 <= rank <= max(most, 1):
            raise ValueError(f"rank: expected 1 to {max(most, 1)}, for which memory_budget has room, got {rank}")
        train = InOrder(train_loader, "train_loader")
        if isinstance(train_loader, Iterator):
            raise ValueError("train_loader: gone over twice, expected a DataLoader or a list, got an iterator")
        with measuring(laplace.model):
            basis = _directions(laplace, train, posterior, rank, progress)
            rows, left = _coordinates(laplace, train, posterior, basis, progress)
        values, base = fingerprint.take(laplace.model, laplace._parameters().values())
        kept = float(rows.double().square().sum())
        description = {
            "format": FORMAT,
            "version": VERSION,
            "n_examples": len(rows),
            "rank": rows.shape[1],
            "kept": kept / max(kept + float(left.double().square().sum()), torch.finfo(torch.float64).tiny),
            "damping": [float(posterior.prior[layer.name]) for layer in laplace.layers],
            "posterior": _posterior_of(posterior),
            "adapter_sha256": adapter_digest(laplace._parameters()),
            "adapters": adapters_of(laplace._parameters()),
            "base_model": base,
        }
        tensors = {ROWS: rows, LEFT: left, BASE: values}
        shapes = posterior.curvature.shapes
        widths = [layer.shape[0] * layer.shape[1] for layer in laplace.layers]
        for i, (layer, part) in enumerate(zip(laplace.layers, basis.split(widths), strict=True)):
            tensors[f"{i}.basis"] = part.mT.reshape(-1, *shapes[layer.name])
        _write(folder, tensors, description)
        return cls.open(laplace, folder)

    @classmethod
    @in_own_surroundings
    def open(cls, laplace: LaplaceLoRA, folder: str | os.PathLike[str]) -> InfluenceIndex:
        """Read an index for the posterior that it was built of.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if a file is damaged or of a newer version, or of another adapter, base model or posterior.
            RuntimeError: before `fit`.
        """
        folder = Path(folder)
        laplace._fitted("InfluenceIndex.open")
        path = folder / JSON_NAME
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no influence index here; expected a folder that build wrote")
        try:
            content = json.loads(path.read_bytes())
            whole = content["format"] == FORMAT and content["sha256"] == storage.content_digest(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged, or no influence index ({error})") from error
        if not whole:
            raise ValueError(f"{path}: damaged or altered, its content does not match its checksum")
        if content["version"] != VERSION:
            raise ValueError(f"{path}: of version {content['version']!r}, expected {VERSION}; update this package")
        if storage.file_digest(folder / TENSORS_NAME) != content["tensors_sha256"]:
            raise ValueError(f"{folder / TENSORS_NAME}: damaged or altered, it does not match its checksum")
        tensors = TensorFile(folder / TENSORS_NAME)
        if adapter_digest(laplace._parameters()) != content["adapter_sha256"]:
            raise ValueError(f"{folder}: of an adapter with other weights; build it again")
        adapters = _adapters(laplace, content["adapters"])
        values = tensors.read(BASE)
        fingerprint.check(laplace.model, laplace._parameters().values(), adapters, values, content["base_model"])
        found = cls(laplace, folder, content, tensors)
        if _posterior_of(found._posterior) != content.get("posterior"):
            raise ValueError(
                f"{folder}: of another posterior (its fit or its noise variance); load the posterior that it was "
                "built of, or build it again"
            )
        return found

    @in_own_surroundings
    def influence(self, queries: Iterable[Any]) -> TruncatedScores:
        """How the loss of each query changes when a training example counts more, without a pass over these.

        The level and sign are those of `blk.influence`.

        Args:
            queries: labelled batches of Q examples; the model runs over them once.

        Raises:
            ValueError: if the posterior's fit or weights have changed, and as `blk.influence`.
        """
        if self._laplace._fitted("influence").curvature is not self._posterior.curvature:
            raise ValueError("influence: fit was called again since; build the index again")
        layers = self._laplace.layers
        parts = [self._tensors.read(f"{i}.basis", layer.device).flatten(1).mT for i, layer in enumerate(layers)]
        basis = torch.cat([part.to(parts[0].device) for part in parts])
        with measuring(self._laplace.model):
            own, own_left = _coordinates(self._laplace, InOrder(queries, "queries"), self._posterior, basis, False)
        rows, left = (self._tensors.read(name, own.device).double() for name in (ROWS, LEFT))
        return TruncatedScores(-own.double() @ rows.mT, own_left.double()[:, None] * left)


def _rooted(laplace: LaplaceLoRA, loader: InOrder, posterior: Posterior, progress: bool) -> Iterator[Tensor]:
    """`B^T grad l [n, P]` of some examples at a time, in the dtype of their gradients."""
    for piece in gradients(laplace, posterior, loader, progress, share=16):
        dtype = piece[laplace.layers[0].name].dtype
        found = posterior.root(piece, transpose=True)
        flat = [found[layer.name].flatten(1) for layer in laplace.layers]
        yield torch.cat([part.to(flat[0].device, dtype) for part in flat], dim=1)


def _directions(laplace: LaplaceLoRA, loader: InOrder, posterior: Posterior, rank: int, progress: bool) -> Tensor:
    """`[P, r]` orthonormal columns that hold most of the squares of all rows; a pass over the data."""
    basis, generator = None, torch.Generator().manual_seed(0)
    for rows in _rooted(laplace, loader, posterior, progress):
        basis = ops.incremental_svd(basis, rows, columns=2 * rank + 10, generator=generator)
    assert basis is not None
    columns = basis[:, :rank].double()
    norms = columns.norm(dim=0)
    if not norms[0] > 0:
        raise ValueError("train_loader: every gradient is zero, so that no example has any influence")
    return torch.linalg.qr((columns / norms.clamp_min(torch.finfo(torch.float64).tiny))[:, norms > 0])[0].to(basis)


def _coordinates(
    laplace: LaplaceLoRA, loader: InOrder, posterior: Posterior, basis: Tensor, progress: bool
) -> tuple[Tensor, Tensor]:
    """Of every example, `[n, r]` and the length of what these leave, `[n]`; a pass over the data."""
    rows, left = [], []
    for x in _rooted(laplace, loader, posterior, progress):
        rows.append(x @ basis)
        left.append((x - rows[-1] @ basis.mT).norm(dim=1))
    return torch.cat(rows), torch.cat(left)


def _posterior_of(posterior: Posterior) -> dict[str, Any]:
    """What one is told by, but for the prior, of which an index has its own."""
    tensors, _ = posterior.curvature.pack()
    return {"noise_variance": float(posterior.noise_variance), "curvature_sha256": values_digest(tensors)}


def _adapters(laplace: LaplaceLoRA, there: list[str]) -> dict[str, str]:
    """`{its name for an adapter: the name it had}`, where there is one."""
    here = adapters_of(laplace._parameters())
    return {here[0]: there[0]} if len(here) == len(there) == 1 else {}


def _own(laplace: LaplaceLoRA, damping: list[float]) -> PriorPrecision:
    """The precisions of the layers, in the order of the model; one, if they are all the same."""
    if len(set(damping)) == 1:
        return damping[0]
    return {layer.name: value for layer, value in zip(laplace.layers, damping, strict=True)}


def _write(folder: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Whole or not at all: in a folder beside it, which takes its name when all is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        write_tensors(temporary / TENSORS_NAME, tensors)
        content = {**description, "tensors_sha256": storage.file_digest(temporary / TENSORS_NAME)}
        content["sha256"] = storage.content_digest(content)
        with open(temporary / TENSORS_NAME, "rb") as file:
            os.fsync(file.fileno())
        storage.write_text(temporary / JSON_NAME, json.dumps(content, indent=1) + "\n")
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # a temporary folder starts out private
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
