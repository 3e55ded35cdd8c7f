"""How the operations are registered with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def custom_op(name: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``torch.library.custom_op``, kept out of CUDA graphs where PyTorch knows how.

    A graph would keep the table of pointers of the call that it captured.
    """
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)  # not in PyTorch 2.6
    if tag is not None:
        options["tags"] = (tag,)
    return torch.library.custom_op(name, **options)
