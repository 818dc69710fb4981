"""Limits over all ingress replicas and per key, with a clock that the tests set."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aft_ray.config import AdmissionConfig, KeyLimits
from aft_ray.engines import Sampling
from aft_ray.inference.plan import Plan
from aft_ray.serving.limits.admission import LOST_S, Admission, Refusal, Ticket, cost_of
from aft_ray.serving.limits.control import Control

NONE = KeyLimits()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock | None = None, **limits: int) -> Admission:
    return Admission(AdmissionConfig(**limits), clock or Clock())


def ticket(name: str, key: str = "alice", num_tokens: int = 10) -> Ticket:
    return Ticket(id=name, key=key, num_tokens=num_tokens)


def refused(refusal: Refusal | None) -> str:
    assert refusal is not None
    return refusal.message


def test_the_cost_of_a_plan_is_all_that_it_may_read_and_write() -> None:
    short, long = Sampling(max_tokens=100), Sampling(max_tokens=1000)
    plan = Plan(num_proposals=5, num_layers=2, proposal=short, aggregation=(short,), final=long)
    drafts, aggregations, final = 5 * (7 + 100), 5 * (7 + 500 + 100), 7 + 500 + 1000
    assert cost_of(plan, 7) == drafts + aggregations + final
    assert cost_of(plan, 7, num_choices=3) == drafts + aggregations + 3 * final
    assert cost_of(replace(plan, hedge_s=2), 7) == 2 * drafts + 2 * aggregations + final
    assert cost_of(replace(plan, subset_size=2), 7) == drafts + 5 * (7 + 200 + 100) + 7 + 200 + 1000
    assert cost_of(Plan(num_layers=0, proposal=short, final=long), 7) == 7 + 100
    assert cost_of(Plan(num_proposals=3, aggregator="vote", proposal=short, final=long), 7) == 3 * (7 + 100)


def test_what_was_used_beyond_the_reservation_is_a_debt() -> None:
    clock = Clock()
    gate, limits = admission(clock), KeyLimits(tokens_per_minute=600)
    assert gate.admit("a", ticket("1", num_tokens=100), limits) is None
    gate.release("a", "1", 1500)
    room = gate.room("alice", limits)
    assert (room.remaining_tokens, room.reset_tokens_s) == (0, 150)
    refusal = gate.admit("a", ticket("2", num_tokens=100), limits)
    assert refusal is not None and refusal.retry_after_s == 60
    clock.now += 110
    assert gate.admit("a", ticket("2", num_tokens=100), limits) is None


def test_a_limit_holds_over_all_ingress_replicas() -> None:
    gate = admission(max_requests=2)
    assert gate.admit("a", ticket("1"), NONE) is None
    assert gate.admit("b", ticket("2"), NONE) is None
    assert "the limit of 2 concurrent requests on this server" in refused(gate.admit("c", ticket("3"), NONE))
    gate.release("a", "1", 10)
    assert gate.admit("c", ticket("3"), NONE) is None


def test_the_costs_of_open_requests_may_not_add_up_to_more_than_the_token_limit() -> None:
    gate = admission(max_tokens=100)
    assert gate.admit("a", ticket("1", num_tokens=60), NONE) is None
    refusal = gate.admit("a", ticket("2", num_tokens=50), NONE)
    assert "100 tokens of concurrent requests on this server" in refused(refusal)
    assert refusal is not None
    assert 1 <= (refusal.retry_after_s or 0) <= 60
    assert gate.admit("a", ticket("3", num_tokens=40), NONE) is None


def test_a_request_that_alone_exceeds_a_limit_is_refused_for_good() -> None:
    refusal = admission(max_tokens=100).admit("a", ticket("1", num_tokens=101), NONE)
    assert refusal is not None
    assert refusal.retry_after_s is None
    assert "101 tokens, more than the limit of 100 tokens of concurrent requests" in refusal.message


def test_a_keys_limits_are_its_own() -> None:
    gate = admission()
    own = KeyLimits(max_requests=1, max_tokens=50)
    assert gate.admit("a", ticket("1"), own) is None
    assert "1 concurrent requests with this key" in refused(gate.admit("b", ticket("2"), own))
    assert gate.admit("b", ticket("3", key="bob"), own) is None


def test_tokens_per_minute_wear_off_and_what_was_not_used_is_given_back() -> None:
    clock = Clock()
    gate, limits = admission(clock), KeyLimits(tokens_per_minute=600)
    assert gate.admit("a", ticket("1", num_tokens=600), limits) is None
    refusal = gate.admit("a", ticket("2", num_tokens=300), limits)
    assert refusal is not None
    assert refusal.retry_after_s == 30  # ten tokens a second
    gate.release("a", "1", 100)
    assert gate.admit("a", ticket("2", num_tokens=300), limits) is None
    assert gate.admit("a", ticket("3", num_tokens=300), limits) is not None
    clock.now += 20
    assert gate.admit("a", ticket("3", num_tokens=300), limits) is None
    assert "600 tokens per minute" in refused(gate.admit("a", ticket("4", num_tokens=601), limits))


def test_asking_twice_for_one_ticket_counts_once() -> None:
    gate = admission(max_requests=2)
    for _ in range(3):
        assert gate.admit("a", ticket("1"), NONE) is None
    assert len(gate.tickets) == 1


def test_what_a_lost_ingress_replica_had_open_is_forgotten() -> None:
    clock = Clock()
    gate = admission(clock, max_requests=1)
    assert gate.admit("a", ticket("1"), NONE) is None
    clock.now += LOST_S / 2
    assert gate.admit("b", ticket("2"), NONE) is not None
    clock.now += LOST_S
    assert gate.admit("b", ticket("2"), NONE) is None


def test_a_release_that_was_lost_is_made_up_for_by_the_next_renewal() -> None:
    gate = admission(max_requests=1)
    gate.admit("a", ticket("1"), NONE)
    gate.renew("a", [])
    assert gate.admit("a", ticket("2"), NONE) is None


def test_a_new_admission_learns_what_is_open() -> None:
    gate = admission(max_requests=2)
    gate.renew("a", [ticket("1"), ticket("2")])
    assert gate.admit("b", ticket("3"), NONE) is not None


def test_a_request_whose_answer_is_on_its_way_is_neither_forgotten_nor_learnt_by_a_renewal() -> None:
    gate = admission(max_requests=1)
    gate.admit("a", ticket("1"), NONE)
    gate.renew("a", [], asking={"1", "2"})
    assert [open_.id for open_ in gate.tickets] == ["1"]


@pytest.mark.parametrize("seconds", [0.5, 30, 4000])
def test_retry_after_follows_how_long_requests_take(seconds: float) -> None:
    clock = Clock()
    gate = admission(clock, max_requests=1)
    for number in range(60):
        gate.admit("a", ticket(str(number)), NONE)
        clock.now += seconds
        gate.release("a", str(number), 1)
    gate.admit("a", ticket("last"), NONE)
    refusal = gate.admit("a", ticket("more"), NONE)
    assert refusal is not None
    assert refusal.retry_after_s == {0.5: 1, 30: 15, 4000: 60}[seconds]


def test_one_ingress_replica_watches_however_often_all_ask() -> None:
    """The answer to its first question may have been lost."""
    control = Control(AdmissionConfig(), {})
    assert [control.may_watch(ingress) for ingress in ("a", "b", "a", "b")] == [True, False, True, False]
