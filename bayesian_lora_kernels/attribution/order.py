"""Loaders whose examples come in an order that the caller knows: scores have a row or a column for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from bayesian_lora_kernels.curvature.shares import parts_of_loader, share_of
from bayesian_lora_kernels.curvature.state import batch_digest
from bayesian_lora_kernels.model.reading import check_loader


class InOrder:
    """The batches of a loader, the same ones every time.

    Args:
        loader: the user's.
        name: of that argument.

    Raises:
        TypeError: if it cannot be a loader.
        ValueError: if it shows that it draws the order of the examples, or gives this process only a share of them;
            while it is gone over, if its batches are not those of the first time.
    """

    def __init__(self, loader: Iterable[Any], name: str):
        check_loader(loader, name)
        for part in parts_of_loader(loader):
            if _draws(part):
                raise ValueError(
                    f"{name}: its {type(part).__name__} draws the order of the examples, so that nobody knows which "
                    "score is whose; expected a loader that keeps their order (shuffle=False)"
                )
        if (share := share_of(loader)) is not None:
            raise ValueError(
                f"{name}: its {share.source} gives this process one of {share.size} shares of the data; expected a "
                "loader of all of them"
            )
        self.loader, self.name = loader, name
        self._known: list[str] | None = None  # digests of the first batch, the first two, ...

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        known, found, digest = self._known, list[str](), ""
        for batch in self.loader:
            found.append(digest := batch_digest(digest, batch))
            if known is not None and found[-1:] != known[len(found) - 1 : len(found)]:
                raise self._other(len(found) - 1)
            yield batch
        if known is not None and len(found) < len(known):
            raise self._other(len(found))
        self._known = found

    def _other(self, index: int) -> ValueError:
        return ValueError(
            f"{self.name}: gone over more than once, and batch {index} is not what it was the first time; expected the "
            "same batches in the same order (no shuffling, nothing drawn)"
        )


def _draws(part: Any) -> bool:
    kinds = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    return isinstance(part, kinds) or getattr(part, "shuffle", None) is True
