"""The operations: nothing in here knows a model. Each is one folder with its public function and its
implementations.
"""

from .attention import attention_jvp
from .dispatch import backends, set_default_impl
from .incremental_svd import grouped_incremental_svd, incremental_svd
from .jacobian_covariance import grouped_jacobian_covariance, jacobian_covariance, jacobian_gram
from .masked_gradient import grouped_masked_gradient
from .outer_product import grouped_outer_product, mirror_lower, outer_product
from .small_eigh import small_eigh
from .square_sum import grouped_square_sum
from .vocabulary import (
    VocabularyStatistics,
    vocabulary_logsumexp,
    vocabulary_probs,
    vocabulary_statistics,
    vocabulary_variance,
)
from .weight_gradient import grouped_weight_gradient

__all__ = [
    "VocabularyStatistics",
    "attention_jvp",
    "backends",
    "grouped_incremental_svd",
    "grouped_jacobian_covariance",
    "grouped_masked_gradient",
    "grouped_outer_product",
    "grouped_square_sum",
    "grouped_weight_gradient",
    "incremental_svd",
    "jacobian_covariance",
    "jacobian_gram",
    "mirror_lower",
    "outer_product",
    "set_default_impl",
    "small_eigh",
    "vocabulary_logsumexp",
    "vocabulary_probs",
    "vocabulary_statistics",
    "vocabulary_variance",
]
