"""Answers that cannot be aggregated (failed, empty, lost with their request) are reported and counted, not shown."""

from __future__ import annotations

import pickle

import pytest
from scripted_runs import (
    BreakingEngine,
    RoutingEngine,
    drafts,
    finished,
    layers_done,
    prompt_of,
    run_plan,
    run_until_error,
    scripted,
)

from aft_ray.engines.base import Sampling
from aft_ray.errors import EngineError, QuorumNotMet
from aft_ray.inference import AnswerDelta, Plan


def test_a_failed_proposal_is_reported_and_counted_but_not_shown() -> None:
    aggregator = scripted()
    events = run_plan(Plan(num_proposals=4), scripted(fail_on=(2,)), aggregator)
    assert [answer.error for answer in drafts(events, 0)] == [None, None, "scripted failure of one sample", None]
    end = finished(events)
    assert [answer.index for answer in end.layers[0]] == [0, 1, 3]
    assert end.answer.inputs == (0, 1, 3)
    assert (end.usage[0].num_answers, end.usage[0].num_failed, end.usage[0].num_cancelled) == (3, 1, 0)


def test_an_empty_proposal_is_a_failed_one() -> None:
    aggregator = scripted()
    events = run_plan(Plan(num_proposals=3), scripted(empty_on=(0,)), aggregator)
    assert [answer.error for answer in drafts(events, 0)] == ["empty answer", None, None]
    assert finished(events).answer.inputs == (1, 2)
    assert finished(events).usage[0].num_failed == 1


def test_a_proposal_of_whitespace_is_an_empty_one() -> None:
    events = run_plan(Plan(num_proposals=3), scripted(answers=("fine", "\n\t", "fine too")), scripted())
    assert [answer.error for answer in drafts(events, 0)] == [None, "empty answer", None]


def test_a_truncated_proposal_is_usable() -> None:
    plan = Plan(num_proposals=3, proposal=Sampling(max_tokens=2))
    end = finished(run_plan(plan, scripted(num_tokens=8)))
    assert [(answer.finish_reason, answer.num_tokens) for answer in end.layers[0]] == [("length", 2)] * 3
    assert end.answer.inputs == (0, 1, 2)


def test_failures_of_a_hidden_layer_are_not_shown_to_the_next() -> None:
    events = run_plan(Plan(num_proposals=3, num_layers=3), scripted(), scripted(empty_on=(1,)))
    assert [[answer.index for answer in layer] for layer in finished(events).layers] == [[0, 1, 2], [0, 2], [0, 2], [0]]
    assert finished(events).answer.inputs == (0, 2)
    assert [usage.num_failed for usage in finished(events).usage] == [0, 1, 1, 0]


def test_fewer_usable_answers_than_the_quorum_end_the_run() -> None:
    aggregator = scripted()
    events, error = run_until_error(Plan(num_proposals=5), scripted(fail_on=(0, 3), empty_on=(1,)), aggregator)
    assert isinstance(error, QuorumNotMet)
    assert "prompt p-1, layer 0: 2 of 5 answers usable, 3 needed, 3 failed or empty" in str(error)
    assert len(drafts(events, 0)) == 5
    assert layers_done(events)[-1].usage.num_failed == 3
    assert aggregator.requests == []


@pytest.mark.parametrize(("num_failing", "is_enough"), [(2, True), (3, False)])
def test_the_default_quorum_is_a_majority(num_failing: int, is_enough: bool) -> None:
    failing = scripted(fail_on=tuple(range(num_failing)))
    _, error = run_until_error(Plan(num_proposals=5), failing, scripted())
    assert (error is None) == is_enough


def test_a_quorum_of_one_goes_on_with_a_single_usable_answer() -> None:
    end = finished(run_plan(Plan(num_proposals=4, quorum=1), scripted(fail_on=(0, 1, 3)), scripted()))
    assert end.answer.inputs == (2,)


def test_a_quorum_of_k_is_not_met_by_k_minus_one() -> None:
    _, error = run_until_error(Plan(num_proposals=4, quorum=4), scripted(fail_on=(1,)), scripted())
    assert isinstance(error, QuorumNotMet)


def test_when_all_failed_the_error_carries_the_first_reason_and_can_cross_processes() -> None:
    events, error = run_until_error(Plan(num_proposals=3), scripted(fail_on=(0, 1, 2)))
    assert isinstance(error, QuorumNotMet)
    assert "0 of 3 answers usable" in str(error) and "scripted failure of one sample" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert layers_done(events)[-1].usage.num_answers == 0


def test_a_request_that_fails_as_a_whole_fails_all_its_answers_and_costs_nothing() -> None:
    events, error = run_until_error(Plan(num_proposals=3), scripted(fail_requests=True))
    assert isinstance(error, QuorumNotMet)
    assert "scripted failure of the whole request" in str(error)
    assert [answer.error for answer in drafts(events, 0)] == ["scripted failure of the whole request"] * 3
    [done] = layers_done(events)
    assert (done.usage.num_failed, done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 0, 0)


def test_a_request_that_breaks_half_way_fails_only_its_unfinished_answers() -> None:
    engine = BreakingEngine(num_samples=3, error=EngineError("connection lost"), num_tokens=4)
    events = run_plan(Plan(num_proposals=5), engine, scripted())
    assert sorted(answer.error or "" for answer in drafts(events, 0)) == ["", "", "", *["connection lost"] * 2]
    usage = finished(events).usage[0]
    assert (usage.num_answers, usage.num_failed) == (3, 2)
    assert usage.prompt_tokens == engine.num_prompt_tokens  # it had begun: the prompts of the lost ones were read


def test_tokens_of_lost_answers_are_counted() -> None:
    engine = BreakingEngine(num_samples=1, error=EngineError("connection lost"), num_tokens=4)
    events, error = run_until_error(Plan(num_proposals=3, deadline_s=20), engine)
    assert isinstance(error, QuorumNotMet)
    usage = layers_done(events)[0].usage
    assert usage.completion_tokens == engine.num_tokens > 4
    assert usage.prompt_tokens == engine.num_prompt_tokens


def test_one_request_of_several_may_fail() -> None:
    """M < K: every slot of a hidden layer has its own request."""

    good, bad = scripted(), BreakingEngine(num_samples=0, error=EngineError("replica died"))
    aggregator = RoutingEngine(lambda request: bad if request.request_id.endswith("/1/0") else good)
    events = run_plan(Plan(num_proposals=4, num_layers=2, subset_size=3, shuffle=True), scripted(), aggregator)
    assert [answer.error for answer in drafts(events, 1)].count("replica died") == 1
    assert finished(events).usage[1].num_answers == 3


def test_an_engine_that_ends_without_answering_is_a_failed_request() -> None:
    engine = BreakingEngine(num_samples=2, error=None)
    events = run_plan(Plan(num_proposals=3), engine, scripted())
    errors = sorted(answer.error or "" for answer in drafts(events, 0))
    assert errors == ["", "", "the engine ended the request without answering"]


def test_an_exception_that_is_not_the_engines_way_to_fail_comes_out_as_it_is() -> None:
    engine = BreakingEngine(num_samples=1, error=KeyError("a bug"))
    events, error = run_until_error(Plan(num_proposals=3), engine)
    assert isinstance(error, KeyError)
    assert engine.num_running == 0
    assert layers_done(events)[0].usage.num_answers == 1


@pytest.mark.parametrize("num_layers", [0, 1, 2])
@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"fail_on": (0,)}, "scripted failure of one sample"),
        ({"fail_requests": True}, "scripted failure of the whole request"),
    ],
    ids=["failed", "request failed"],
)
def test_without_a_final_answer_the_run_ends_in_an_engine_error_that_names_the_layer(
    num_layers: int, knobs: dict[str, object], reason: str
) -> None:
    good, bad = scripted(), scripted(**knobs)
    engine = RoutingEngine(lambda request: bad if request.request_id.endswith(f"/{num_layers}/0") else good)
    events, error = run_until_error(Plan(num_layers=num_layers), engine)
    assert isinstance(error, EngineError)
    assert f"layer {num_layers} (the last): {reason}" in str(error)
    assert len(layers_done(events)) == num_layers
    assert not any(isinstance(event, AnswerDelta) for event in events)


@pytest.mark.parametrize("num_layers", [0, 1])
def test_an_empty_final_answer_is_an_answer(num_layers: int) -> None:
    good, empty = scripted(), scripted(empty_on=(0,))
    engine = RoutingEngine(lambda request: empty if request.request_id.endswith(f"/{num_layers}/0") else good)
    last = finished(run_plan(Plan(num_layers=num_layers), engine))
    assert (last.answer.text, last.answer.error, last.answer.finish_reason) == ("", None, "stop")


def test_duplicates_keep_their_slots_unless_they_are_dropped() -> None:
    proposer = scripted(answers=("Nile", " Nile\n", "Danube", "Nile"))
    kept, dropped = scripted(), scripted()
    assert finished(run_plan(Plan(num_proposals=4), proposer, kept)).answer.inputs == (0, 1, 2, 3)
    end = finished(run_plan(Plan(num_proposals=4, drop_duplicates=True), proposer, dropped))
    assert end.answer.inputs == (0, 2)
    assert (prompt_of(kept.requests[0]).count("Nile"), prompt_of(dropped.requests[0]).count("Nile")) == (3, 1)
    assert len(end.layers[0]) == end.usage[0].num_answers == 4


def test_duplicates_do_not_touch_the_quorum() -> None:
    end = finished(run_plan(Plan(num_proposals=5, drop_duplicates=True), scripted(answers=("same",)), scripted()))
    assert end.answer.inputs == (0,)
