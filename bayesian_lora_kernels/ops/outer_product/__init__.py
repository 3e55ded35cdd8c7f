"""Accumulated outer products of rows: the Kronecker factors."""

from .op import grouped_outer_product, mirror_lower, outer_product

__all__ = ["grouped_outer_product", "mirror_lower", "outer_product"]
