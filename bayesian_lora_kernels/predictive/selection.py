"""Which inputs to label next: greedily those from whose labels the weights would learn most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bayesian_lora_kernels.curvature.likelihood import LIKELIHOODS
from bayesian_lora_kernels.surroundings import in_own_surroundings

if TYPE_CHECKING:
    from bayesian_lora_kernels.laplace import LaplaceLoRA


class Selection(NamedTuple):
    """What `select_batch` chose.

    Attributes:
        indices: of the examples in the pool, in the order of choice, `[count]`.
        gains: what the labels of each are expected to tell beside those before it, in nats, `[count]` float64.
    """

    indices: Tensor
    gains: Tensor


@in_own_surroundings
def select_batch(laplace: LaplaceLoRA, pool: Any, count: int) -> Selection:
    """The examples of a pool whose labels would tell most about the weights together, chosen one after the other.

    With K the covariance of the logits of some examples and H their output Fisher, their labels are worth
    `1/2 logdet(I + H^1/2 K H^1/2)`: half of what they add to the log-determinant of the precision, the Gaussian form of
    BatchBALD. Examples that say the same count once. The greedy choice is worth at least 1 - 1/e of the best one.

    Sources: Kirsch, van Amersfoort, Gal 2019, "BatchBALD"; Nemhauser, Wolsey, Fisher 1978.

    Args:
        laplace: after `fit`.
        pool: a batch of N examples, without labels or with labels that are ignored; it takes about
            `16 (N C)^2` bytes beside the memory of `laplace.joint`.
        count: how many to choose.

    Raises:
        TypeError: if `count` is not an int.
        ValueError: if it is not between 1 and N; for ranked lists, whose Fisher depends on the labels.
        RuntimeError, ValueError, TypeError: as `laplace.joint`.
    """
    inputs = laplace._inputs(pool)
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count: expected an int, got {count!r}")
    if not 1 <= count <= inputs.size:
        raise ValueError(f"count: expected 1 to {inputs.size}, the examples of the pool, got {count}")
    if laplace.likelihood == "plackett-luce":
        raise ValueError("select_batch: not for likelihood='plackett-luce', whose Fisher needs the ranking")
    likelihood = LIKELIHOODS[laplace.likelihood]()
    mean, covariance = laplace._joint_predictor().gaussian(inputs)
    n, c = mean.shape
    likelihood.check_logits(mean)
    noise = laplace.noise_variance.detach().to(mean.device)
    columns = likelihood.exact_columns(mean.double()) / noise.sqrt()  # [N, C, m]
    m = columns.shape[2]
    kernel = torch.einsum("acm,acx->amx", columns, covariance.reshape(n, c, n * c)).reshape(n, m, n, c)
    kernel = torch.einsum("ambc,bck->ambk", kernel, columns)
    own = torch.arange(n, device=kernel.device)
    # The covariance of each example's rows given those chosen so far, with the noise of its labels: unit.
    rest = kernel[own, :, own] + torch.eye(m, dtype=kernel.dtype, device=kernel.device)
    known = kernel.new_zeros(n, m, 0)
    indices, gains = [], []
    taken = torch.zeros(n, dtype=torch.bool, device=kernel.device)
    for _ in range(count):
        worth = 0.5 * torch.linalg.slogdet(rest)[1]
        best = int(worth.masked_fill(taken, -torch.inf).argmax())
        indices.append(best)
        gains.append(worth[best])
        taken[best] = True
        factor = torch.linalg.cholesky(rest[best])
        cross = kernel[:, :, best] - known @ known[best].mT
        step = torch.linalg.solve_triangular(factor.mT, cross, upper=True, left=False)
        rest = rest - step @ step.mT
        known = torch.cat([known, step], dim=2)
    return Selection(torch.tensor(indices, device=mean.device), torch.stack(gains))
