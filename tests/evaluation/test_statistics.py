"""Means, counts and intervals against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from aft_ray.evaluation.statistics import (
    Estimate,
    estimate,
    estimate_ratio,
    estimate_share,
    paired_difference,
    resample,
)


def test_missing_values_stay_out_of_the_mean_and_are_counted() -> None:
    value = estimate([1.0, None, 0.0, 1.0, None])
    assert value.mean == pytest.approx(2 / 3)
    assert (value.num, value.num_missing) == (3, 2)


def test_nothing_but_missing_values_gives_no_mean() -> None:
    assert estimate([None, None]) == Estimate(mean=None, low=None, high=None, num=0, num_missing=2)


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0, 1.0]], ids=["one value", "all equal"])
def test_a_sample_that_cannot_tell_gives_no_interval(values: list[float]) -> None:
    value = estimate(values)
    assert value.mean == values[0]
    assert value.low is None and value.high is None and not value.excludes_zero


def test_the_interval_of_a_large_sample_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(10, 2, size=2000)
    half = 1.96 * values.std() / math.sqrt(2000)
    value = estimate(list(values), num_resamples=4000)
    assert value.low == pytest.approx(values.mean() - half, abs=0.01)
    assert value.high == pytest.approx(values.mean() + half, abs=0.01)


def test_the_interval_agrees_with_scipy() -> None:
    values = [0.0, 0.0, 0.5, 1.0, 1.0, 0.25, 0.75, 0.5, 0.0, 1.0]
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=3).confidence_interval
    ours = estimate(values, num_resamples=20_000)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=0.02), pytest.approx(theirs.high, abs=0.02))


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = list(np.linspace(0, 1, 17) ** 2)
    assert estimate(values, seed=5) == estimate(values, seed=5)
    assert estimate(values, seed=5) != estimate(values, seed=6)


@pytest.mark.parametrize("draws_at_once", [1, 70, 1000], ids=["fewer than rows", "in parts", "all at once"])
def test_many_rows_are_resampled_in_parts_with_the_promised_number_of_resamples(draws_at_once: int) -> None:
    means = resample(np.arange(10.0), np.ones(10), num_resamples=100, seed=0, draws_at_once=draws_at_once)
    assert len(means) == 100
    assert means.min() >= 0 and means.max() <= 9 and means.mean() == pytest.approx(4.5, abs=0.5)


def test_a_ratio_weighs_rows_by_their_denominator() -> None:
    assert estimate_ratio([10.0, 2.0], [10, 1]).mean == pytest.approx(12 / 11)


def test_a_ratio_refuses_rows_without_a_denominator() -> None:
    with pytest.raises(ValueError, match="2 numerators for 1 denominators"):
        estimate_ratio([1.0, 2.0], [1.0])


def test_a_share_has_the_wilson_interval() -> None:
    value = estimate_share([True] * 8 + [False] * 2 + [None])
    centre, half = (0.8 + 1.96**2 / 20) / (1 + 1.96**2 / 10), 1.96 / 1.38416 * math.sqrt(0.016 + 1.96**2 / 400)
    assert (value.mean, value.num, value.num_missing) == (0.8, 10, 1)
    assert value.low == pytest.approx(centre - half, abs=1e-4)
    assert value.high == pytest.approx(centre + half, abs=1e-4)


def test_none_of_n_still_has_an_interval() -> None:
    value = estimate_share([False] * 20)
    assert value.low == pytest.approx(0, abs=1e-12)
    assert value.high == pytest.approx(1.96**2 / (20 + 1.96**2), abs=1e-4)  # Wilson at 0 of n: z²/(n + z²)


def test_pairing_takes_the_difficulty_of_the_prompts_out_of_the_interval() -> None:
    hard_to_easy = list(np.linspace(0, 1, 30))
    better = [value + 0.1 + 0.01 * (index % 2) for index, value in enumerate(hard_to_easy)]
    difference = paired_difference(better, hard_to_easy)
    assert difference.mean == pytest.approx(0.105)
    assert difference.excludes_zero
    assert difference.high is not None and difference.low is not None and difference.high - difference.low < 0.01


def test_a_pair_with_a_missing_side_is_missing() -> None:
    difference = paired_difference([1.0, None, 0.5], [0.0, 1.0, None])
    assert (difference.mean, difference.num, difference.num_missing) == (1.0, 1, 2)
