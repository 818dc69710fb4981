"""Whole numbers in proportion to weights: how many of K drafts, or of the proposals of a prompt, each proposer writes.

apportion(8, [3, 1])                     -> [6, 2]
apportion(2, [1, 1, 1])                  -> [1, 1, 0]
apportion(4, [10, 1, 1, 1], least=1)     -> [1, 1, 1, 1]
"""

from __future__ import annotations

from collections.abc import Sequence


def apportion(total: int, weights: Sequence[float], *, least: int = 0) -> list[int]:
    """Return one count per weight; the counts add up to `total`.

    The largest remainders are rounded up, the first of equal ones first. Every count is at least `least`, or, where
    `total` is too small for that, at least the largest number that all can have.
    """
    least = min(least, total // len(weights))
    quotas = [total * weight / sum(weights) for weight in weights]
    counts = [max(least, int(quota)) for quota in quotas]
    while sum(counts) < total:
        counts[max(range(len(counts)), key=lambda i: quotas[i] - counts[i])] += 1
    while sum(counts) > total:
        # `least` added too many: take one from the count furthest above its quota, of equal ones from the last
        above = [i for i in reversed(range(len(counts))) if counts[i] > least]
        counts[max(above, key=lambda i: counts[i] - quotas[i])] -= 1
    return counts
