"""Batched eigendecomposition of small symmetric matrices."""

from .op import small_eigh

__all__ = ["small_eigh"]
