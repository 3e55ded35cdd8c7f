"""Sums of squares of rows: the traces of the Kronecker factors."""

from .op import grouped_square_sum

__all__ = ["grouped_square_sum"]
