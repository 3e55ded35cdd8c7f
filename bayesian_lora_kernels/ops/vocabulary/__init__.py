"""Predictive distributions over a whole vocabulary, from samples of the hidden state, without their logits."""

from .op import VocabularyStatistics, vocabulary_logsumexp, vocabulary_probs, vocabulary_statistics
from .op_variance import vocabulary_variance

__all__ = [
    "VocabularyStatistics",
    "vocabulary_logsumexp",
    "vocabulary_probs",
    "vocabulary_statistics",
    "vocabulary_variance",
]
