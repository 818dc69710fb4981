"""Means that carry their count and interval.

Prompts are the unit that is resampled: the drafts of one prompt are not independent of each other, the prompts are.

    estimate([1.0, 0.0, None, 1.0])  ->  mean 0.67 of 3 values, 1 missing, with a 95 % interval

The intervals are percentile bootstrap intervals (Efron 1979): resample the prompts with replacement, take the mean,
read off the 2.5 % and 97.5 % points. Where the sample cannot tell (one value, or all values equal, where every
resample is the same) there is no interval rather than one of width zero. Shares of right answers have the Wilson
interval, which is honest at 0 of n and n of n too. A missing value is counted and stays out of every mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS_AT_ONCE = 4_000_000
"""Values drawn in one numpy call: bounds memory at about 100 MB, whatever the number of prompts."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval and the number of values behind it."""

    mean: float | None
    """None when there was no value at all."""
    low: float | None
    high: float | None
    """Bounds of the 95 % interval, or None where the sample gives none."""
    num: int
    """Values in the mean."""
    num_missing: int = 0
    """Values left out because there was no score."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float | None], *, num_resamples: int = 2000, seed: int = 0) -> Estimate:
    """Return the mean of the values that are not None, with a bootstrap interval over them."""
    present = [value for value in values if value is not None]
    ratio = estimate_ratio(present, [1.0] * len(present), num_resamples=num_resamples, seed=seed)
    return Estimate(
        mean=ratio.mean, low=ratio.low, high=ratio.high, num=len(present), num_missing=len(values) - len(present)
    )


def estimate_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return the sum of numerators over the sum of denominators (such as nats per token); whole rows are resampled.

    Both have one entry per row; denominators are above zero.
    """
    top, bottom = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if top.shape != bottom.shape:
        raise ValueError(f"{len(top)} numerators for {len(bottom)} denominators: every row needs both")
    if len(top) == 0:
        return Estimate(mean=None, low=None, high=None, num=0)
    mean = float(top.sum() / bottom.sum())
    if len(np.unique(top / bottom)) < 2:
        return Estimate(mean=mean, low=None, high=None, num=len(top))
    low, high = np.percentile(resample(top, bottom, num_resamples, seed), [2.5, 97.5])
    return Estimate(mean=mean, low=float(low), high=float(high), num=len(top))


def resample(
    top: np.ndarray, bottom: np.ndarray, num_resamples: int, seed: int, draws_at_once: int = DRAWS_AT_ONCE
) -> np.ndarray:
    """Return the ratio sum(top) / sum(bottom) of each of `num_resamples` bootstrap samples of the rows."""
    generator = np.random.default_rng(seed)
    per_call = max(1, draws_at_once // len(top))
    ratios = []
    for start in range(0, num_resamples, per_call):
        picked = generator.integers(len(top), size=(min(per_call, num_resamples - start), len(top)))
        ratios.append(top[picked].sum(axis=1) / bottom[picked].sum(axis=1))
    return np.concatenate(ratios)


def estimate_share(outcomes: Sequence[bool | None]) -> Estimate:
    """Return the share of true outcomes with the Wilson (1927) interval."""
    from scipy.stats import binomtest

    present = [outcome for outcome in outcomes if outcome is not None]
    num_missing = len(outcomes) - len(present)
    if not present:
        return Estimate(mean=None, low=None, high=None, num=0, num_missing=num_missing)
    interval = binomtest(sum(present), len(present)).proportion_ci(confidence_level=0.95, method="wilson")
    return Estimate(
        mean=sum(present) / len(present),
        low=float(interval.low),
        high=float(interval.high),
        num=len(present),
        num_missing=num_missing,
    )


def paired_difference(
    first: Sequence[float | None], second: Sequence[float | None], *, num_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return the mean of first - second over the prompts that have both; entry i of each belongs to the same prompt.

    Pairing takes the difficulty of the prompts out of the interval.
    """
    differences = [a - b if a is not None and b is not None else None for a, b in zip(first, second, strict=True)]
    return estimate(differences, num_resamples=num_resamples, seed=seed)
