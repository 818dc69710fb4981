"""Several models each write their share of the drafts; one model aggregates."""

from __future__ import annotations

import dataclasses
import random

import pytest
from scripted_runs import drafts, finished, role, run_plan, scripted

from aft_ray.inference import Plan
from aft_ray.inference.shares import apportion


@pytest.mark.parametrize(
    ("shares", "num_slots", "expected"),
    [([1, 1], 4, [2, 2]), ([1, 1], 5, [3, 2]), ([3, 1], 4, [3, 1]), ([1, 1, 1], 2, [1, 1, 0]), ([1], 3, [3])],
)
def test_slots_are_allotted_by_share_and_add_up(shares: list[float], num_slots: int, expected: list[int]) -> None:
    assert apportion(num_slots, shares) == expected


@pytest.mark.parametrize("least", [0, 1, 3])
def test_the_counts_always_add_up_and_nobody_gets_less_than_the_least_where_that_is_possible(least: int) -> None:
    draw = random.Random(least)
    for _ in range(2000):
        total = draw.randrange(40)
        weights = sorted((draw.choice([0.1, 1, 3, 10, 1e6]) for _ in range(draw.randint(1, 8))), reverse=True)
        counts = apportion(total, weights, least=least)
        assert sum(counts) == total
        assert min(counts) >= min(least, total // len(weights))
        assert counts == sorted(counts, reverse=True), (
            "a larger weight never gets less; of equal ones the first gets more"
        )


def test_slots_are_handed_out_in_order_and_each_is_written_once() -> None:
    engines = [scripted(), scripted(), scripted()]
    proposers = [
        dataclasses.replace(role(engine), share=share) for engine, share in zip(engines, (2, 2, 0.1), strict=True)
    ]
    events = run_plan(Plan(num_proposals=5, num_layers=1), proposers, scripted())
    assert sorted(answer.index for answer in drafts(events, 0)) == [0, 1, 2, 3, 4]
    assert [[len(request.seeds) for request in engine.requests] for engine in engines] == [[3], [2], []]


def test_each_proposer_writes_its_slots_in_one_request_and_the_aggregator_sees_all() -> None:
    small, large, aggregator = scripted(answers=("small",)), scripted(answers=("large",)), scripted()
    proposers = [dataclasses.replace(role(small), share=3), dataclasses.replace(role(large), share=1)]
    events = run_plan(Plan(num_proposals=4, num_layers=2), proposers, aggregator)
    assert [answer.text for answer in drafts(events, 0)] == ["small"] * 3 + ["large"]
    assert [len(request.seeds) for request in small.requests + large.requests] == [3, 1]
    assert len({seed for request in small.requests + large.requests for seed in request.seeds}) == 4
    assert [len(request.seeds) for request in aggregator.requests] == [4, 1]
    assert finished(events).usage[0].num_answers == 4


def test_a_single_sample_is_written_by_the_largest_share() -> None:
    small, large = scripted(answers=("small",)), scripted(answers=("large",))
    proposers = [role(small), dataclasses.replace(role(large), share=2)]
    assert finished(run_plan(Plan(num_layers=0), proposers, scripted())).answer.text == "large"


def test_a_proposer_that_fails_leaves_the_quorum_to_the_others() -> None:
    proposers = [role(scripted()), role(scripted(fail_requests=True))]
    usage = finished(run_plan(Plan(num_proposals=4, quorum=2), proposers, scripted())).usage[0]
    assert (usage.num_answers, usage.num_failed) == (2, 2)
