"""Usage: a run reports exactly the tokens that the engine was asked to read and that it wrote."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import aclosing
from typing import Any

import pytest
from scripted_runs import (
    CachingEngine,
    FailingLateEngine,
    StallingEngine,
    finished,
    layers_done,
    run,
    run_plan,
    run_until_error,
    scripted,
    start,
)

from aft_ray.config import ScriptedEngineConfig
from aft_ray.errors import DeadlineExceeded, QuorumNotMet
from aft_ray.inference import AnswerDelta, LayerUsage, Plan, ProposalDone, Role
from aft_ray.templates import ChatFormat


@pytest.mark.parametrize(
    ("plan", "knobs"),
    [
        pytest.param(Plan(num_layers=0), {}, id="single"),
        pytest.param(Plan(num_layers=1), {}, id="L=1"),
        pytest.param(Plan(num_layers=3), {}, id="L=3"),
        pytest.param(Plan(num_layers=2, subset_size=2), {}, id="M<K"),
        pytest.param(Plan(num_layers=2, quorum=1), {"fail_on": (1, 3)}, id="failed"),
        pytest.param(Plan(num_layers=2, quorum=1), {"empty_on": (2,)}, id="empty"),
        pytest.param(Plan(num_layers=2, deadline_s=20), {"fail_on": (4,)}, id="streamed below the last layer"),
    ],
)
def test_usage_adds_up_to_the_engines_own_count(plan: Plan, knobs: dict[str, object]) -> None:
    engine = scripted(num_tokens=7, **knobs)
    end = finished(run_plan(plan, engine))
    assert sum(usage.prompt_tokens for usage in end.usage) == engine.num_prompt_tokens > 0
    assert sum(usage.completion_tokens for usage in end.usage) == engine.num_tokens > 0
    num_ended = sum(u.num_answers + u.num_failed + u.num_cancelled for u in end.usage)
    assert num_ended == (plan.num_samples if plan.num_layers else 1)


def test_usage_adds_up_with_stragglers_cancelled_in_every_layer_below_the_last() -> None:
    proposer, aggregator = StallingEngine(stall_on={0}), StallingEngine(stall_on={4}, stall_after=11)
    plan = Plan(num_layers=3, draft_deadline_s=0.3)
    end = finished(run_plan(plan, proposer, aggregator))
    assert [usage.num_cancelled for usage in end.usage] == [1, 1, 1, 0]
    assert end.usage[0].completion_tokens == proposer.num_tokens
    assert sum(usage.completion_tokens for usage in end.usage[1:]) == aggregator.num_tokens
    assert sum(usage.prompt_tokens for usage in end.usage[1:]) == aggregator.num_prompt_tokens


def test_tokens_streamed_before_a_failure_are_counted_though_the_failure_reports_none() -> None:
    engine = FailingLateEngine(ScriptedEngineConfig(num_tokens=7))
    events, error = run_until_error(Plan(num_proposals=3, deadline_s=20), engine)
    assert "too late" in str(error)
    assert layers_done(events)[0].usage.completion_tokens == engine.num_tokens == 3 * 7


def test_prompt_tokens_are_counted_once_per_answer_and_the_cached_ones_beside_them() -> None:
    engine = CachingEngine(ScriptedEngineConfig())
    end = finished(run_plan(Plan(num_proposals=4), engine))
    num_prompt_tokens = end.layers[0][0].num_prompt_tokens
    assert end.usage[0].prompt_tokens == 4 * num_prompt_tokens
    assert end.usage[0].cached_tokens == 3 * num_prompt_tokens
    assert [answer.num_cached_tokens for answer in end.layers[0]] == [0, *[num_prompt_tokens] * 3]
    assert end.usage[1].cached_tokens == 0


def test_each_layer_reports_its_own_seconds_and_the_same_usage_when_done_and_at_the_end() -> None:
    events = run_plan(Plan(num_layers=2), scripted(num_tokens=4, seconds_per_token=0.01))
    end = finished(events)
    assert [usage.layer for usage in end.usage] == [0, 1, 2]
    assert all(0.04 <= usage.seconds < 5 for usage in end.usage)
    assert [done.usage for done in layers_done(events)] == list(end.usage[:-1])


@pytest.mark.parametrize(
    "end_it", ["deadline", "closed in layer 0", "closed in the last layer", "failed", "answered"], ids=str
)
def test_every_token_is_accounted_for_however_the_run_ends(end_it: str, chatml_tokenizer: str) -> None:
    """The usage reported to `on_usage` equals the engine's own count, and nothing is reported after the end."""
    prompts = ChatFormat.load(chatml_tokenizer)
    plan = Plan(num_proposals=3, deadline_s=0.4 if end_it == "deadline" else None)
    stalls = end_it in {"deadline", "closed in layer 0"}
    knobs: dict[str, Any] = {"tokenizer": chatml_tokenizer, "num_tokens": 4}
    proposer = StallingEngine({1} if stalls else set(), fail_on=(0, 1, 2) * (end_it == "failed"), **knobs)
    aggregator = StallingEngine({0} if end_it == "closed in the last layer" else set(), **knobs)
    told: list[LayerUsage] = []

    async def read() -> None:
        roles = [Role(engine=engine, format=prompts) for engine in (proposer, aggregator)]
        events = start(plan, *roles, on_usage=told.append)
        with contextlib.suppress(DeadlineExceeded, QuorumNotMet):
            async with aclosing(events):
                async for event in events:
                    if end_it == "closed in layer 0" and isinstance(event, ProposalDone):
                        await asyncio.sleep(0.05)  # the stalling sample has written its tokens
                        return
                    if end_it == "closed in the last layer" and isinstance(event, AnswerDelta):
                        await asyncio.sleep(0.05)
                        return

    run(read())
    assert sum(usage.completion_tokens for usage in told) == proposer.num_tokens + aggregator.num_tokens
    assert sum(usage.prompt_tokens for usage in told) == proposer.num_prompt_tokens + aggregator.num_prompt_tokens > 0
