"""Whether tokens that a mask leaves out have a gradient."""

from .op import grouped_masked_gradient

__all__ = ["grouped_masked_gradient"]
