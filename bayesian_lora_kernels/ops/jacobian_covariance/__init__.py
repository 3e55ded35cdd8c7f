"""Gram matrices of the Jacobians of chosen outputs, in the identity or in a Kronecker posterior
covariance.
"""

from .op import grouped_jacobian_covariance, jacobian_covariance, jacobian_gram

__all__ = ["grouped_jacobian_covariance", "jacobian_covariance", "jacobian_gram"]
