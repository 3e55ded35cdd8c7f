"""Running low-rank estimates of a sum of outer products, one touch of the data per batch."""

from .op import grouped_incremental_svd, incremental_svd

__all__ = ["grouped_incremental_svd", "incremental_svd"]
