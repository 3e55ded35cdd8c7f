"""Per-example weight gradients of many modules."""

from .op import grouped_weight_gradient

__all__ = ["grouped_weight_gradient"]
