"""How alike two texts are: Jaccard similarity of their sets of n-grams, 0 to 1."""

from __future__ import annotations

N = 3
SHORT = 8
"""A text of fewer words has too few word n-grams to tell anything: such a pair is compared by characters."""


def similarity(first: str, second: str) -> float:
    """Shared word 3-grams over all of both; character 3-grams where either text is shorter than 8 words.

    Upper and lower case and white space do not count.

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
    """The n-grams of a sequence; one shorter than n is its own only n-gram."""
    return {items[i : i + N] for i in range(max(1, len(items) - N + 1))}
