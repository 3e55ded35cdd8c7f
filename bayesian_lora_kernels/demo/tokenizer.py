"""A WordPiece tokenizer whose vocabulary is counted in a fixed order, so that it is the same in every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

PAD, UNKNOWN, START = "<pad>", "<unk>", "<s>"
QUESTION = ("module", ":")  # what follows a sentence, before the answer
LONGEST_PIECE = 5


def build_tokenizer(sentences: Iterable[Sequence[str]], names: Sequence[str], vocabulary: int, pieces: int) -> Any:
    """A `transformers.PreTrainedTokenizerFast` for sentences that are already words.

    Its entries: special tokens, `names` (each is one token, to answer with), single characters, the most frequent
    words, and `pieces` beginnings, middles and ends of the others.

    Args:
        sentences: what to count.
        names: words that must be one token each.
        vocabulary: how many entries there are.
        pieces: how many of them are parts of words.

    Raises:
        ValueError: if `vocabulary` leaves no room for words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = _vocabulary(sentences, names, vocabulary, pieces)
    ids = {entry: i for i, entry in enumerate(entries)}
    backend = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, max_input_chars_per_word=60))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, unk_token=UNKNOWN, bos_token=START, padding_side="left"
    )


def _vocabulary(sentences: Iterable[Sequence[str]], names: Sequence[str], size: int, pieces: int) -> list[str]:
    counts = Counter(word for sentence in sentences for word in sentence)
    characters = sorted({character for word in counts for character in word})
    fixed = [PAD, UNKNOWN, START, *QUESTION, *names, *characters, *(f"##{c}" for c in characters)]
    entries = dict.fromkeys(fixed)  # in order, each once
    room = size - pieces
    if len(entries) >= room:
        raise ValueError(f"vocabulary: expected more than {len(entries) + pieces} entries, got {size}")
    by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
    common = [word for word in by_frequency if word not in entries][: room - len(entries)]
    entries.update(dict.fromkeys(common))
    parts = _parts((word for word in by_frequency if word not in entries and word.isalpha()), counts)
    # what saves most tokens: long and frequent
    gain = {part: count * (len(part.removeprefix("##")) - 1) for part, count in parts.items() if part not in entries}
    entries.update(dict.fromkeys(sorted(gain, key=lambda part: (-gain[part], part))[: size - len(entries)]))
    return list(entries)


def _parts(rare: Iterable[str], counts: Counter[str]) -> Counter[str]:
    """How often each beginning, middle and end of 2 to 5 letters occurs in rare words; middles count half."""
    parts: Counter[str] = Counter()
    for word in rare:
        weight = 2 * counts[word]
        for length in range(2, min(LONGEST_PIECE, len(word) - 1) + 1):
            parts[word[:length]] += weight
            for start in range(1, len(word) - length + 1):
                end = start + length == len(word)
                parts[f"##{word[start : start + length]}"] += weight if end else weight // 2
    return parts
