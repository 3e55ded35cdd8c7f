"""Softmax attention with its derivative along many tangents at once."""

from .op import attention_jvp

__all__ = ["attention_jvp"]
