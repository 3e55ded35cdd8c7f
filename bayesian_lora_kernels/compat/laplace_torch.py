"""Curvature backends for laplace-torch 0.3: `laplace.Laplace(model, ..., backend=BlkGGN)`.

Jacobians and gradients come from backward passes that serve all examples of a batch at once; Kronecker factors leave
padding out. What differs in numbers from laplace-torch's own backends, and why, is in `docs/migrating.md`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bayesian_lora_kernels.compat.untouched import BoxedForward, boxed
from bayesian_lora_kernels.config import LaplaceConfig
from bayesian_lora_kernels.curvature.factors import KroneckerSums
from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS
from bayesian_lora_kernels.model.capture import Capture
from bayesian_lora_kernels.model.forward import IGNORED_LABEL
from bayesian_lora_kernels.model.jacobians import unit_cotangents
from bayesian_lora_kernels.model.layers import LinearLayer, linear_layer
from bayesian_lora_kernels.model.measuring import measuring
from bayesian_lora_kernels.model.pieces import capture
from bayesian_lora_kernels.model.reading import MASK_KEYS

try:
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
    from laplace.utils import Kron
except ImportError as error:
    raise ImportError(
        "bayesian_lora_kernels.compat.laplace_torch needs laplace-torch 0.3; docs/migrating.md says how to install it "
        f"without another PyTorch ({error})"
    ) from error

__all__ = ["BlkEF", "BlkGGN"]


HALF_PRECISION = (torch.float16, torch.bfloat16)


class _HalfKron(Kron):
    """Factors of a half-precision model: float32 until they are decomposed, and then in the model's dtype.

    There is no eigendecomposition in half precision; laplace-torch's ends the Python process where it meets that.
    """

    def __init__(self, kfacs: list[list[Tensor]], dtype: torch.dtype):
        super().__init__([[factor.float() for factor in factors] for factors in kfacs])
        self.dtype = dtype

    def __add__(self, other: Kron) -> _HalfKron:
        return _HalfKron(super().__add__(other).kfacs, self.dtype)

    def __mul__(self, scalar: float | Tensor) -> _HalfKron:
        return _HalfKron(super().__mul__(scalar).kfacs, self.dtype)

    __radd__ = __add__
    __rmul__ = __mul__

    def decompose(self, damping: bool = False) -> Any:
        whole = super().decompose(damping)
        vectors = [[matrix.to(self.dtype) for matrix in group] for group in whole.eigenvectors]
        values = [[vector.to(self.dtype) for vector in group] for group in whole.eigenvalues]
        return type(whole)(vectors, values, damping=damping)


class _Blk(CurvatureInterface, ABC):
    """What both backends share: passes over one batch of a model whose trainable parameters are all in `nn.Linear`."""

    @cached_property
    def _layers(self) -> list[LinearLayer]:
        model = self.model.last_layer if self.last_layer else self.model
        modules = dict(model.named_modules())
        _check_not_shared(model)
        trained: dict[str, set[str]] = {}
        for name in self.params_dict:
            owner, _, leaf = name.rpartition(".")
            if not isinstance(modules[owner], nn.Linear):
                raise ValueError(
                    f"{owner or 'the model'} ({type(modules[owner]).__name__}): {type(self).__name__} serves nn.Linear "
                    f"only; freeze {name}, or use backend=CurvlinopsGGN"
                )
            trained.setdefault(owner, set()).add(leaf)
        return [linear_layer(owner, modules, leaves) for owner, leaves in trained.items()]

    @cached_property
    def _forward(self) -> BoxedForward:
        return BoxedForward(self.model, lambda model, inputs: model(inputs), masked=True)

    def _capture(self, x: Any) -> Capture:
        masks = {key: x[key] for key in MASK_KEYS if key in x} if isinstance(x, Mapping) else {}
        return capture(self._layers, self._forward, boxed(x, **masks))

    def _flat(self, gradients: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """`{layer: [N, d_out, d_in]}` as `[N, P]`, in the order of the parameters."""
        parts: dict[tuple[str, str], Tensor] = {}
        for layer in self._layers:
            if layer.name in gradients:
                for name, part in layer.split(gradients[layer.name]).items():
                    parts[layer.name, name.rpartition(".")[2]] = part.flatten(1)
        columns = []
        for name, parameter in self.params_dict.items():
            owner, _, leaf = name.rpartition(".")
            found = parts.get((owner, leaf))
            columns.append(like.new_zeros(len(like), parameter.numel()) if found is None else found.to(like.dtype))
        flat = torch.cat(columns, dim=1)
        return flat if self.subnetwork_indices is None else flat[:, self.subnetwork_indices]

    def _rows(self, recorded: Capture, cotangents: Iterable[Tensor], count: int) -> Tensor:
        """`[N, count, P]`: one backward pass for each cotangent, for all examples at once."""
        logits, names = recorded.logits, set(recorded.inputs)
        rows: Tensor | None = None
        for i, cotangent in enumerate(cotangents):
            gradients = recorded.backward(cotangent, weight_gradients=names, retain_graph=i + 1 < count)
            row = self._flat(gradients, logits.detach())
            rows = row.new_empty(len(row), count, row.shape[1]) if rows is None else rows
            rows[:, i] = row
        assert rows is not None
        return rows

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians `[N, C, P]` and outputs `[N, C]` (`[N, T, C, P]` and `[N, T, C]` with a token dimension).

        One backward pass for each of the C outputs. With `enable_backprop` laplace-torch's own method runs, because a
        graph through the Jacobian is wanted.

        Raises:
            ValueError: if a trainable parameter is not in an `nn.Linear`, or shared between modules; it is named.
        """
        if enable_backprop:
            return super().jacobians(x, enable_backprop=True)
        with measuring(self.model):
            recorded = self._capture(x)
            logits = recorded.logits
            count = logits[0].numel()
            rows = self._rows(recorded, unit_cotangents(logits, range(count)), count)
        return rows.reshape(*logits.shape, -1), logits.detach()

    def selected_output_jacobians(
        self, x: Any, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Jacobians `[N, K, P]` of the outputs `[N]` or `[N, K]` chosen for each input, and all outputs `[N, C]`."""
        if enable_backprop:
            return super().selected_output_jacobians(x, outputs, enable_backprop=True)
        outputs = outputs[:, None] if outputs.ndim == 1 else outputs
        with measuring(self.model):
            recorded = self._capture(x)
            logits = recorded.logits
            if logits.ndim != 2 or len(outputs) != len(logits):
                raise ValueError(
                    f"outputs: expected [N] or [N, K] for logits [N, C], got {list(outputs.shape)} for "
                    f"{list(logits.shape)}"
                )
            chosen = outputs.to(logits.device, torch.long)
            rows = self._rows(recorded, unit_cotangents(logits, chosen), chosen.shape[1])
        return rows, logits.detach()

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients `[N, P]` of `lossfunc` for each example, from one backward pass, and the summed loss."""
        with measuring(self.model):
            recorded = self._capture(x)
            loss, cotangent = self._loss(recorded.logits, y)
            rows = self._rows(recorded, [cotangent], 1)
        return rows[:, 0], loss

    def _loss(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The summed `lossfunc` and its gradient with respect to the logits."""
        f = logits.detach().requires_grad_()
        if f.ndim == 3 and self.likelihood == "classification":
            loss = self.lossfunc(f.flatten(0, 1), y.flatten())
        else:
            loss = self.lossfunc(f, y)
        (gradient,) = torch.autograd.grad(loss, f)
        return loss.detach(), gradient

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Kron]:
        """Kronecker factors of one batch of a data set of N examples, padding left out.

        `S` is a sum over the batch, `A` a mean over its valid tokens times its share of the examples, so that batches
        add up to the factors of docs/method.md if texts are equally long on average in each.

        Args:
            x: inputs, as the model takes them; an `attention_mask` in a mapping tells padding.
            y: labels `[N]`, `[N, T]` with -100 for none, or targets of the shape of the outputs.
            N: examples in the whole data set.
            **kwargs: `kfac_approx` (`expand` or `reduce`), `mc_samples`.

        Returns:
            The batch's negative log-likelihood up to a constant, and `[S, A]` for each weight, `[S]` for each bias.

        Raises:
            TypeError: for other keyword arguments.
            ValueError: as `jacobians`.
        """
        tokens = kwargs.pop("kfac_approx", "expand")
        samples = kwargs.pop("mc_samples", getattr(self, "num_samples", 1))
        if kwargs or tokens not in ("expand", "reduce"):
            raise TypeError(f"kron: expected kfac_approx='expand' or 'reduce' and mc_samples, got {tokens!r}, {kwargs}")
        sums = KroneckerSums(LaplaceConfig(tokens=tokens, rank=None, tail=False))
        with measuring(self.model):
            recorded = self._capture(x)
            loss, gradient = self._loss(recorded.logits, y)
            sums.add_inputs(recorded.inputs)
            for cotangent, last in self._cotangents(recorded.logits, y, gradient, samples):
                gradients = recorded.backward(cotangent, retain_graph=not last)
                sums.add_gradients(gradients, recorded.inputs)
        factors = sums.factors()
        share, kfacs = len(recorded.logits) / N, []
        for name, parameter in self.params_dict.items():
            owner, _, leaf = name.rpartition(".")
            if owner not in factors:
                kfacs.append([parameter.new_zeros(d, d) for d in parameter.shape])
            elif leaf == "weight":
                d = parameter.shape[1]  # a column for the bias may follow
                kfacs.append([factors[owner].s.clone(), factors[owner].a[:d, :d] * share])
            else:
                kfacs.append([factors[owner].s.clone()])
        dtype = recorded.logits.dtype
        return self.factor * loss, _HalfKron(kfacs, dtype) if dtype in HALF_PRECISION else Kron(kfacs)

    @abstractmethod
    def _cotangents(self, logits: Tensor, y: Tensor, gradient: Tensor, samples: int) -> Iterable[tuple[Tensor, bool]]:
        """Output cotangents whose second moment is the Fisher of one batch, and whether each is the last."""


class BlkGGN(_Blk, GGNInterface):
    """Generalised Gauss-Newton: exact, or with sampled targets (`stochastic=True`, `num_samples`).

    `diag` and `full` are laplace-torch's, from these Jacobians.
    """

    num_samples: int

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `GGNInterface.diag`; `mc_samples` counts as in `kron`."""
        self.num_samples = kwargs.pop("mc_samples", self.num_samples)
        return super().diag(x, y, **kwargs)

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `GGNInterface.full`; `mc_samples` counts as in `kron`."""
        self.num_samples = kwargs.pop("mc_samples", self.num_samples)
        return super().full(x, y, **kwargs)

    def _cotangents(self, logits: Tensor, y: Tensor, gradient: Tensor, samples: int) -> Iterable[tuple[Tensor, bool]]:
        likelihood = LIKELIHOODS[str(getattr(self.likelihood, "value", self.likelihood))]()
        mask = None
        if logits.ndim == 3 and y.shape == logits.shape[:2] and not y.is_floating_point():
            mask = y != IGNORED_LABEL
        generator = torch.Generator(logits.device)
        if self.stochastic:  # PyTorch's global generator decides, as in laplace-torch
            generator.manual_seed(int(torch.randint(2**62, ())))
        fisher = "mc" if self.stochastic else "exact"
        return likelihood.cotangents(logits, mask, y, fisher=fisher, samples=samples, generator=generator)


class BlkEF(_Blk, EFInterface):
    """Empirical Fisher: outer products of the gradients of the log-likelihood of the labels."""

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `EFInterface.diag`, of the log-likelihood: for regression half of what that returns."""
        loss, diagonal = super().diag(x, y, **kwargs)
        return loss, self.factor * diagonal

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `EFInterface.full`, of the log-likelihood: for regression half of what that returns."""
        loss, matrix = super().full(x, y, **kwargs)
        return loss, self.factor * matrix

    def _cotangents(self, logits: Tensor, y: Tensor, gradient: Tensor, samples: int) -> Iterable[tuple[Tensor, bool]]:
        yield self.factor * gradient, True


def _check_not_shared(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and owners.setdefault(id(parameter), name) != name:
            raise ValueError(f"{name} and {owners[id(parameter)]} are one parameter, which is not supported; freeze it")
