"""Gram matrices of the Jacobians of chosen outputs, in the identity or in a Kronecker posterior
covariance.
"""

from .op import jacobian_covariance, jacobian_gram

__all__ = ["jacobian_covariance", "jacobian_gram"]
