"""When memory runs out with so many examples at a time, the rest of a fit has half as many."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)


class Limit:
    """How many examples run at a time.

    Attributes:
        examples: at most; None as long as memory has not run out.
        where: what messages begin with.

    Args:
        may_change: False where other processes run the same model in step with this one, and would not know.
    """

    def __init__(self, may_change: bool = True) -> None:
        self.examples: int | None = None
        self.may_change = may_change
        self.where = ""

    def within(self, step: int) -> int:
        """A number of examples that is no more than this."""
        return step if self.examples is None else min(step, self.examples)

    def halve(self, examples: int, error: Exception) -> None:
        """Memory ran out with so many.

        Raises:
            torch.OutOfMemoryError: if it was one, or the number may not change.
        """
        if not self.may_change:
            raise torch.OutOfMemoryError(
                f"memory ran out with {examples} examples at a time ({error}), which the other processes that FSDP "
                "shards the model over cannot know; pass smaller batches, or a smaller memory_budget"
            ) from error
        if examples < 2:
            raise torch.OutOfMemoryError(
                f"{self.where}a single example does not fit into memory ({error}); shorten it, or use gradient "
                "checkpointing, a smaller dtype or another device"
            ) from error
        self.examples = examples // 2
        logger.info("%smemory ran out with %d examples at a time: from here on %d", self.where, examples, self.examples)


def ran_out(error: BaseException) -> bool:
    """Whether it says that memory could not be allocated, on a GPU or by PyTorch on the host."""
    host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError) or host
