"""Depth and width: how many answers, in which requests, from which model, in which order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from scripted_runs import MESSAGES, StallingEngine, drafts, finished, prompt_of, role, run, run_plan, scripted, start

from aft_ray.engines.base import Sampling
from aft_ray.errors import ConfigError
from aft_ray.inference import (
    AnswerDelta,
    Event,
    Finished,
    LayerDone,
    Plan,
    ProposalDone,
    Role,
    propose_and_aggregate,
    run_to_end,
)
from aft_ray.inference.plan import FinalLayer
from aft_ray.records import derive_seed
from aft_ray.templates import AggregatorTemplate, ChatFormat, MessagesFormat
from tests.templates.families import make_tokenizer


def short(events: list[Event]) -> str:
    letters = {ProposalDone: "p", LayerDone: "L", AnswerDelta: "d", Finished: "F"}
    return "".join(letters[type(event)] for event in events)


@pytest.mark.parametrize(
    ("num_layers", "num_proposals", "order"),
    [
        pytest.param(0, 3, "ddF", id="L=0 is one plain sample"),
        pytest.param(1, 3, "pppLddF", id="L=1"),
        pytest.param(2, 3, "pppLpppLddF", id="L=2"),
        pytest.param(3, 2, "ppLppLppLddF", id="L=3"),
        pytest.param(2, 1, "pLpLddF", id="K=1"),
    ],
)
def test_a_run_samples_k_times_l_plus_one_answers_and_yields_them_in_order(
    num_layers: int, num_proposals: int, order: str
) -> None:
    engine = scripted(num_tokens=2)
    plan = Plan(num_layers=num_layers, num_proposals=num_proposals)
    events = run_plan(plan, engine)
    assert short(events) == order
    assert sum(len(request.seeds) for request in engine.requests) == num_proposals * num_layers + 1 == plan.num_samples
    assert [usage.num_answers for usage in finished(events).usage] == [num_proposals] * num_layers + [1]


def test_a_layer_is_one_request_so_that_its_prompt_is_computed_once() -> None:
    engine = scripted()
    run_plan(Plan(num_layers=3, num_proposals=4), engine)
    assert [len(request.seeds) for request in engine.requests] == [4, 4, 4, 1]
    assert [request.stream for request in engine.requests] == [False, False, False, True]


def test_no_two_answers_share_a_seed_and_every_seed_is_derived_from_its_place() -> None:
    engine = scripted()
    run_plan(Plan(num_layers=3, num_proposals=5), engine, run_seed=7)
    seeds = [request.seeds for request in engine.requests]
    assert seeds == [tuple(derive_seed(7, "p-1", layer, i) for i in range(5)) for layer in range(3)] + [
        (derive_seed(7, "p-1", 3, 0),)
    ]
    assert len(set(sum(seeds, ()))) == 16


def test_each_layer_is_shown_the_answers_of_the_layer_below_and_the_conversation() -> None:
    engine = scripted()
    end = finished(run_plan(Plan(num_layers=2, num_proposals=3), engine))
    for layer in (1, 2):
        prompt = prompt_of(engine.requests[layer])
        assert MESSAGES[0]["content"] in prompt
        places = [prompt.index(answer.text) for answer in end.layers[layer - 1]]
        assert places == sorted(places)
        assert all(answer.inputs == (0, 1, 2) for answer in end.layers[layer])
    assert end.messages == engine.requests[-1].messages
    assert not any(answer.text in prompt_of(engine.requests[-1]) for answer in end.layers[0])


def test_finished_holds_every_answer_and_the_deltas_make_up_the_final_one() -> None:
    events = run_plan(Plan(num_layers=2, num_proposals=3), scripted(num_tokens=5))
    end = finished(events)
    assert [[answer.index for answer in layer] for layer in end.layers] == [[0, 1, 2], [0, 1, 2], [0]]
    assert [list(end.layers[0]), list(end.layers[1])] == [drafts(events, 0), drafts(events, 1)]
    assert end.layers[2] == (end.answer,)
    deltas = [event for event in events if isinstance(event, AnswerDelta)]
    assert "".join(delta.text for delta in deltas) == end.answer.text
    assert sum(delta.num_tokens for delta in deltas) == end.answer.num_tokens == 5


def test_a_plain_single_sample_sees_the_conversation_alone_and_uses_the_proposal_sampling() -> None:
    engine = scripted()
    plan = Plan(num_layers=0, proposal=Sampling(temperature=0.3), final=Sampling(temperature=0.9))
    end = finished(run_plan(plan, engine))
    [request] = engine.requests
    assert (request.messages, request.sampling.temperature, len(request.seeds)) == (MESSAGES, 0.3, 1)
    assert (end.answer.layer, end.messages, len(end.layers)) == (0, MESSAGES, 1)


def test_every_layer_has_its_own_sampling() -> None:
    engine = scripted()
    hidden = (Sampling(temperature=0.2), Sampling(temperature=0.3))
    plan = Plan(num_layers=4, proposal=Sampling(temperature=0.1), aggregation=hidden, final=Sampling(temperature=0.4))
    run_plan(plan, engine)
    assert [request.sampling.temperature for request in engine.requests] == [0.1, 0.2, 0.3, 0.3, 0.4]


def test_proposer_and_aggregator_may_be_different_models_with_different_adapters() -> None:
    proposer, aggregator = scripted(answers=("draft",)), scripted(answers=("refined",))
    end = finished(run_plan(Plan(num_layers=2), role(proposer, "adapters/sft"), role(aggregator, "adapters/aft")))
    assert [request.adapter for request in proposer.requests] == ["adapters/sft"]
    assert [request.adapter for request in aggregator.requests] == ["adapters/aft"] * 2
    assert [answer.text for answer in end.layers[0] + end.layers[1]] == ["draft"] * 5 + ["refined"] * 5
    assert end.answer.text == "refined"


def test_the_same_run_gives_the_same_answers_and_another_seed_others() -> None:
    def texts(run_seed: int) -> list[list[str]]:
        end = finished(run_plan(Plan(num_layers=2), scripted(), run_seed=run_seed))
        return [[answer.text for answer in layer] for layer in end.layers]

    assert texts(1) == texts(1) != texts(2)


def test_request_ids_are_unique_even_between_two_runs_of_one_prompt() -> None:
    engine = scripted()
    run_plan(Plan(num_layers=2, subset_size=2), engine)
    run_plan(Plan(num_layers=2, subset_size=2), engine)
    run_plan(Plan(num_layers=0), engine, request_id="r-9")
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == len(ids)
    assert ids[-1].startswith("r-9")


def test_stop_strings_of_the_format_are_added_to_those_of_the_plan() -> None:
    class Stopping(MessagesFormat):
        @property
        def stop_strings(self) -> tuple[str, ...]:
            return ("# Query:", "END")

    engine = scripted()
    part = Role(engine=engine, format=Stopping())
    run_plan(Plan(num_layers=1, proposal=Sampling(stop=("END",))), part)
    assert [request.sampling.stop for request in engine.requests] == [("END", "# Query:"), ("# Query:", "END")]


def test_a_format_without_ids_is_refused_for_an_engine_that_takes_ids() -> None:
    with pytest.raises(ConfigError, match="layer 0: engine scripted takes token ids"):
        run_plan(Plan(), scripted(tokenizer="some/folder"))


def test_no_prompt_waits_for_another_ones_layer() -> None:
    """99 prompts finish all their layers while the proposals of one more are still being written."""
    stuck, fast, aggregator = StallingEngine(stall_on={1}), scripted(num_tokens=2), scripted(num_tokens=2)

    async def answer(number: int) -> Finished:
        kwargs: dict[str, Any] = {"messages": MESSAGES, "template": AggregatorTemplate.load("aft")}
        proposer = role(stuck if number == 0 else fast)
        kwargs |= {"prompt_id": f"p-{number}", "plan": Plan(num_layers=2)}
        return await run_to_end(propose_and_aggregate(proposer=proposer, aggregator=role(aggregator), **kwargs))

    async def all_of_them() -> None:
        slow, *others = [asyncio.create_task(answer(number)) for number in range(100)]
        ends = await asyncio.gather(*others)
        assert len({end.answer.text for end in ends}) == 99
        assert not slow.done()
        assert stuck.num_running == 1
        slow.cancel()
        await asyncio.wait([slow])
        assert slow.cancelled()
        assert stuck.num_running == 0

    run(all_of_them())


def test_a_layer_starts_as_soon_as_the_one_below_is_over_and_not_before() -> None:
    engine = scripted(num_tokens=2, seconds_per_token=0.001)

    async def look() -> None:
        async for event in start(Plan(num_layers=2, num_proposals=3), engine):
            if isinstance(event, ProposalDone):
                assert len(engine.requests) in {event.answer.layer + 1, event.answer.layer + 2}
            if isinstance(event, AnswerDelta):
                assert len(engine.requests) == 3

    run(look())


def test_only_a_final_answer_that_a_client_reads_is_streamed() -> None:
    """Drafts are not, nor is the final answer where the reply is sent in one piece."""
    for is_read in (True, False):
        engine = scripted()
        run_plan(Plan(num_layers=2), engine, final=FinalLayer(is_read=is_read))
        assert [request.stream for request in engine.requests] == [False, False, is_read]


def test_every_request_ends_where_its_models_format_ends_turns(tmp_path: Path) -> None:
    """Llama 3 writes <|eot_id|> after an answer, and its tokenizer's eos is <|end_of_text|>."""
    tokenizer = make_tokenizer("llama3")
    tokenizer.save_pretrained(tmp_path)
    engine = scripted(tokenizer=str(tmp_path))
    ends = tuple(tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"]))
    run_plan(Plan(num_layers=2, num_proposals=2), Role(engine=engine, format=ChatFormat.load(str(tmp_path))))
    assert [request.stop_ids for request in engine.requests] == [ends] * 3
