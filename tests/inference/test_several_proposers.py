"""Several models draft, each its share of the slots; one aggregates."""

from __future__ import annotations

import dataclasses

import pytest
from scripted_runs import drafts, finished, role, run_plan, scripted

from aft_ray.inference import Plan
from aft_ray.inference.calls import allot


@pytest.mark.parametrize(
    ("shares", "num_slots", "expected"),
    [([1, 1], 4, [2, 2]), ([1, 1], 5, [3, 2]), ([3, 1], 4, [3, 1]), ([1, 1, 1], 2, [1, 1, 0]), ([1], 3, [3])],
)
def test_slots_are_allotted_by_share_and_add_up(shares: list[float], num_slots: int, expected: list[int]) -> None:
    ranges = allot(num_slots, [dataclasses.replace(role(scripted()), share=share) for share in shares])
    assert [len(slots) for slots in ranges] == expected
    assert [slot for slots in ranges for slot in slots] == list(range(num_slots))


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
