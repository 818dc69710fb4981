"""Measures the similarity of two texts: the Jaccard index of their sets of n-grams, from 0 to 1."""

from __future__ import annotations

N = 3
SHORT = 8
"""A text of fewer words has too few word n-grams to compare, so character n-grams are used instead."""


def similarity(first: str, second: str) -> float:
    """Return the share of word 3-grams that the texts have in common.

    Character 3-grams are used if either text has fewer than 8 words. Letter case and white space are ignored.

    >>> similarity("The capital is Paris.", "the capital  is paris."), similarity("Paris", "Lyon")
    (1.0, 0.0)
    """
    words = [text.lower().split() for text in (first, second)]
    if min(map(len, words)) < SHORT:
        one, other = (_ngrams(" ".join(parts)) for parts in words)
    else:
        one, other = (_ngrams(tuple(parts)) for parts in words)
    return len(one & other) / len(one | other)


def _ngrams(items: str | tuple[str, ...]) -> set[str | tuple[str, ...]]:
    """Return the n-grams of a sequence. A sequence shorter than n is its own only n-gram."""
    return {items[i : i + N] for i in range(max(1, len(items) - N + 1))}
