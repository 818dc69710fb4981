"""The run's deadline, the draft deadline with its quorum, and consumers that stop reading."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import aclosing

import pytest
from scripted_runs import (
    RoutingEngine,
    StallingEngine,
    drafts,
    finished,
    layers_done,
    run,
    run_plan,
    run_until_error,
    scripted,
    start,
)

from aft_ray.errors import DeadlineExceeded, QuorumNotMet
from aft_ray.inference import AnswerDelta, Plan

# ── the whole run ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_in_the_middle_of_the_proposals_cancels_them_and_reports_their_cost() -> None:
    engine = StallingEngine(stall_on={1, 2}, num_tokens=4)
    events, error = run_until_error(Plan(num_proposals=3, num_layers=2, deadline_s=0.5), engine)
    assert isinstance(error, DeadlineExceeded)
    assert "prompt p-1: deadline_s 0.5 passed in layer 0 of 2" in str(error)
    assert [answer.index for answer in drafts(events, 0)] == [0]
    [done] = layers_done(events)
    assert (done.usage.num_answers, done.usage.num_failed, done.usage.num_cancelled) == (1, 0, 2)
    assert done.usage.completion_tokens == engine.num_tokens == 4 + 3 + 3
    assert done.usage.prompt_tokens == engine.num_prompt_tokens
    assert engine.num_running == 0


def test_a_deadline_in_the_middle_of_the_last_layer_comes_after_the_tokens_made_so_far() -> None:
    aggregator = StallingEngine(stall_on={0}, stall_after=5)
    events, error = run_until_error(Plan(num_proposals=3, deadline_s=0.5), scripted(), aggregator)
    assert isinstance(error, DeadlineExceeded)
    assert "passed in layer 1 of 1" in str(error)
    assert sum(event.num_tokens for event in events if isinstance(event, AnswerDelta)) == 5
    assert aggregator.num_running == 0


def test_a_deadline_that_is_not_reached_changes_nothing() -> None:
    plain, timed = (
        finished(run_plan(Plan(num_layers=2, deadline_s=deadline_s), scripted())) for deadline_s in (None, 20)
    )
    assert plain.answer == timed.answer


def test_a_consumer_who_is_slow_to_read_is_not_cut_by_the_deadline() -> None:
    """Only the run's own work is on the clock: no timeout reaches into the code between two events."""

    async def read_slowly() -> int:
        num_events = 0
        async with aclosing(start(Plan(num_proposals=2, deadline_s=0.5), scripted(num_tokens=2))) as events:
            async for _ in events:
                await asyncio.sleep(0.12)
                num_events += 1
        return num_events

    assert run(read_slowly()) == 2 + 1 + 2 + 1


def test_an_engines_own_timeout_is_not_taken_for_the_deadline() -> None:
    class TimingOut(StallingEngine):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            raise TimeoutError("socket")
            yield

    _, error = run_until_error(Plan(deadline_s=20), TimingOut(stall_on=set()))
    assert type(error) is TimeoutError
    assert str(error) == "socket"


# ── the draft deadline ───────────────────────────────────────────────────────────────────────────────────────────────


def test_after_the_draft_deadline_a_quorum_is_enough_and_stragglers_are_cancelled_and_counted() -> None:
    proposer = StallingEngine(stall_on={1, 3}, stall_after=6, num_tokens=4)
    events = run_plan(Plan(num_proposals=5, draft_deadline_s=0.5), proposer, scripted())
    end = finished(events)
    assert end.answer.inputs == (0, 2, 4)
    assert [answer.index for answer in drafts(events, 0)] == [0, 2, 4]
    usage = end.usage[0]
    assert (usage.num_answers, usage.num_failed, usage.num_cancelled) == (3, 0, 2)
    assert usage.completion_tokens == proposer.num_tokens == 3 * 4 + 2 * 6
    assert usage.prompt_tokens == proposer.num_prompt_tokens
    assert usage.seconds >= 0.5
    assert layers_done(events)[0].usage == usage
    assert proposer.num_running == 0


def test_all_k_are_waited_for_until_the_draft_deadline() -> None:
    proposer = scripted(num_tokens=2, seconds_per_token=0.005, slow_on=(4,), slow_factor=10)
    end = finished(run_plan(Plan(num_proposals=5, draft_deadline_s=20), proposer, scripted()))
    assert (end.usage[0].num_answers, end.usage[0].num_cancelled) == (5, 0)


def test_a_layer_that_is_complete_does_not_wait_for_its_draft_deadline() -> None:
    began = time.monotonic()
    run_plan(Plan(num_layers=3, draft_deadline_s=15), scripted())
    assert time.monotonic() - began < 10


def test_without_a_quorum_the_layer_goes_on_after_the_draft_deadline_until_it_is_met() -> None:
    proposer = scripted(num_tokens=2, seconds_per_token=0.01, slow_on=(0, 1, 2, 3, 4), slow_factor=10)
    end = finished(run_plan(Plan(num_proposals=5, draft_deadline_s=0.02), proposer, scripted()))
    assert end.usage[0].num_answers >= 3
    assert end.usage[0].seconds >= 0.2


def test_failed_answers_do_not_count_for_the_quorum() -> None:
    """Two answers fail and one stalls: one is usable, fewer than the quorum of 2, so the deadline ends the run."""
    proposer = StallingEngine(stall_on={3}, fail_on=(0, 1))
    plan = Plan(num_proposals=4, quorum=2, draft_deadline_s=0.02, deadline_s=0.5)
    events, error = run_until_error(plan, proposer, scripted())
    assert isinstance(error, DeadlineExceeded)
    assert layers_done(events)[0].usage.num_cancelled == 1


def test_all_ended_below_the_quorum_fails_before_any_draft_deadline() -> None:
    _, error = run_until_error(Plan(num_proposals=4, draft_deadline_s=15), scripted(fail_on=(0, 1, 2)))
    assert isinstance(error, QuorumNotMet)


def test_hidden_layers_have_their_own_draft_deadline() -> None:
    aggregator = StallingEngine(stall_on={2}, num_tokens=4)
    end = finished(run_plan(Plan(num_proposals=3, num_layers=3, draft_deadline_s=0.3), scripted(), aggregator))
    assert [usage.num_cancelled for usage in end.usage] == [0, 1, 1, 0]
    assert end.answer.inputs == (0, 1)


def test_the_last_layer_has_no_draft_deadline() -> None:
    aggregator = scripted(num_tokens=3, seconds_per_token=0.02)
    end = finished(run_plan(Plan(num_proposals=2, draft_deadline_s=0.01), scripted(), aggregator))
    assert (end.usage[1].num_answers, end.answer.num_tokens) == (1, 3)


def test_stragglers_in_several_requests_are_all_cancelled() -> None:
    """M < K: each slot of the hidden layer has its own request; all but the first stall."""

    good, stalling = scripted(), StallingEngine(stall_on={0})
    aggregator = RoutingEngine(lambda request: good if request.request_id.endswith(("/1/0", "/2/0")) else stalling)
    plan = Plan(num_proposals=4, num_layers=2, subset_size=3, shuffle=True, quorum=1, draft_deadline_s=0.3)
    end = finished(run_plan(plan, scripted(), aggregator))
    assert (end.usage[1].num_answers, end.usage[1].num_cancelled) == (1, 3)
    assert len(stalling.requests) == 3
    assert stalling.num_running == 0


# ── consumers who go away ────────────────────────────────────────────────────────────────────────────────────────────

POINTS = pytest.mark.parametrize(
    "num_events",
    [0, 1, 3, 4, 6, 8, 9],
    ids=["at once", "proposal 1", "proposal 3", "layer 0 done", "aggregation 2", "layer 1 done", "first token"],
)


@POINTS
def test_cancelling_the_consumer_aborts_every_request_and_is_not_swallowed(num_events: int) -> None:
    engine = scripted(num_tokens=3, seconds_per_token=0.002)

    async def read() -> None:
        seen = 0
        async with aclosing(start(Plan(num_proposals=3, num_layers=2), engine)) as events:
            if num_events == 0:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
            async for _ in events:
                seen += 1
                if seen == num_events:
                    asyncio.current_task().cancel()  # type: ignore[union-attr]
        pytest.fail("went on after being cancelled")

    async def cancel() -> None:
        reader = asyncio.create_task(read())
        await asyncio.wait([reader])
        assert reader.cancelled()
        num_requests = len(engine.requests)
        assert engine.num_running == 0
        await asyncio.sleep(0.02)
        assert (len(engine.requests), engine.num_running) == (num_requests, 0)

    run(cancel())


@POINTS
def test_closing_the_generator_early_aborts_every_request(num_events: int) -> None:
    engine = scripted(num_tokens=3, seconds_per_token=0.002)

    async def read() -> None:
        events = start(Plan(num_proposals=3, num_layers=2), engine)
        for _ in range(num_events):
            await anext(events)
        await events.aclose()
        assert engine.num_running == 0
        num_requests = len(engine.requests)
        await asyncio.sleep(0.02)
        assert len(engine.requests) == num_requests

    run(read())


def test_a_generator_that_is_dropped_is_closed_too() -> None:
    engine = StallingEngine(stall_on={1})

    async def read() -> None:
        async for _ in start(Plan(num_proposals=3), engine):
            break
        gc.collect()
        closing = asyncio.all_tasks() - {asyncio.current_task()}  # the event loop closes it, in tasks of its own
        assert closing
        await asyncio.wait(closing)
        await asyncio.sleep(0)

    run(read())
    assert engine.num_running == 0
