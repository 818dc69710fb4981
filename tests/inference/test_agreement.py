"""Answers that need no aggregation: early stop when all agree, and the vote with its ties."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from scripted_runs import MESSAGES, StallingEngine, drafts, finished, role, run_plan, scripted

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.errors import EngineError
from aft_ray.inference import AnswerDelta, Plan, Role
from aft_ray.inference.answers import short_answer
from aft_ray.templates import ChatFormat


def asked(engine: ScriptedEngine) -> list[int]:
    """Return the number of samples of each request that the engine got."""
    return [len(request.seeds) for request in engine.requests]


# ── early stop ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_drafts_that_are_all_equal_end_the_run_and_the_usage_says_so() -> None:
    engine = scripted(answers=("It is 12.",))
    events = run_plan(Plan(num_proposals=3, num_layers=2, early_stop="exact"), engine)
    end = finished(events)
    assert asked(engine) == [3]
    assert (end.answer.layer, end.answer.text, end.answer.inputs) == (2, "It is 12.", (0, 1, 2))
    assert [usage.decided_by for usage in end.usage] == ["model", "agreement", "agreement"]
    assert [usage.completion_tokens for usage in end.usage] == [9, 0, 0]
    assert [usage.num_answers for usage in end.usage] == [3, 0, 1]
    assert [len(layer) for layer in end.layers] == [3, 0, 1]
    assert [event.text for event in events if isinstance(event, AnswerDelta)] == ["It is 12."]
    assert end.messages == MESSAGES


def test_drafts_that_say_the_same_in_other_words_agree_in_their_answer_alone() -> None:
    knobs: dict[str, Any] = {"answers": ("12", "So the answer is 12.")}
    by_answer, by_text = scripted(**knobs), scripted(**knobs)
    run_plan(Plan(num_proposals=2, early_stop="answer"), by_answer)
    run_plan(Plan(num_proposals=2, early_stop="exact"), by_text)
    assert (asked(by_answer), asked(by_text)) == ([2], [2, 1])


@pytest.mark.parametrize(
    ("plan", "knobs"),
    [
        pytest.param(Plan(num_proposals=3), {"answers": ("12",)}, id="not asked for"),
        pytest.param(Plan(num_proposals=1, early_stop="exact"), {"answers": ("12",)}, id="one draft"),
        pytest.param(Plan(num_proposals=3, early_stop="answer"), {"answers": ("12", "12", "13")}, id="one differs"),
        pytest.param(Plan(num_proposals=2, early_stop="answer"), {"num_tokens": 30}, id="no short answer in them"),
    ],
)
def test_without_agreement_the_answer_is_written(plan: Plan, knobs: dict[str, Any]) -> None:
    end = finished(run_plan(plan, engine := scripted(**knobs)))
    assert asked(engine) == [plan.num_proposals, 1]
    assert end.usage[-1].decided_by == "model"


def test_agreement_in_a_hidden_layer_skips_what_is_above_it() -> None:
    proposer, aggregator = scripted(), scripted(answers=("12",))
    end = finished(run_plan(Plan(num_proposals=3, num_layers=3, early_stop="exact"), proposer, aggregator))
    assert (asked(proposer), asked(aggregator)) == ([3], [3])
    assert [usage.decided_by for usage in end.usage] == ["model", "model", "agreement", "agreement"]


# ── vote ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lone_capital_a_is_a_choice() -> None:
    end = finished(
        run_plan(Plan(num_proposals=3, aggregator="vote"), scripted(answers=("B", "(A)", "The answer is A.")))
    )
    assert (end.answer.text, end.answer.inputs) == ("(A)", (1, 2))


@pytest.mark.parametrize(
    "text",
    [
        "the answer is a" + " " * 40_000 + "b",
        "the answer is a" + "." * 40_000 + "b",
        "the answer is " + "a " * 40_000,
        "answer" + " " * 40_000,
        "<answer>" * 40_000,
    ],
    ids=["spaces", "points", "words", "nothing said", "open tags"],
)
def test_a_long_answer_is_read_in_linear_time(text: str) -> None:
    """It takes milliseconds; a search that starts again at each character takes more than ten seconds."""
    started = time.process_time()
    short_answer(text)
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is Paris. It lies on the Seine.", "paris"),
        ("La réponse: the answer is 12 ! Voilà.", "12"),
        ("The answer is 3.5   \nI am sure.", "3.5"),
        ("Answer:\n  New   York  ?", "new york"),
        ("<answer>a</answer> no: <answer>b</answer>", "b"),
        ("I thought for a long time about this question, and I am sure that the answer is ", None),
    ],
)
def test_a_marked_answer_ends_with_its_sentence_or_line(text: str, expected: str | None) -> None:
    assert short_answer(text) == expected


def test_a_vote_answers_with_the_first_text_of_the_majority_and_asks_no_aggregator() -> None:
    engine = scripted(answers=("13", "The answer is 12.", "12", "I cannot tell you that without more to go on, sorry."))
    plan = Plan(num_proposals=4, aggregator="vote")
    end = finished(run_plan(plan, engine))
    assert asked(engine) == [4]
    assert plan.num_samples == 4
    assert (end.answer.text, end.answer.inputs) == ("The answer is 12.", (1, 2))
    assert [usage.decided_by for usage in end.usage] == ["model", "vote"]
    assert end.usage[1].completion_tokens == 0


def test_a_vote_at_depth_counts_the_last_aggregations() -> None:
    end = finished(
        run_plan(Plan(num_proposals=3, num_layers=2, aggregator="vote"), scripted(), scripted(answers=("B", "A", "A")))
    )
    assert (end.answer.text, end.answer.inputs) == ("A", (1, 2))


def test_a_single_sample_has_nothing_to_vote_on() -> None:
    plan = Plan(num_layers=0, aggregator="vote")
    assert finished(run_plan(plan, scripted(answers=("A",)))).usage[0].decided_by == "model"
    assert plan.num_samples == 1


def test_texts_without_a_short_answer_are_compared_whole() -> None:
    long = "one two three four five six seven eight nine ten eleven"
    end = finished(run_plan(Plan(num_proposals=3, aggregator="vote"), scripted(answers=(long + " a b", long, long))))
    assert (end.answer.text, end.answer.inputs) == (long, (1, 2))


class ScoringEngine(ScriptedEngine):
    """Scores one text as likely and every other one as unlikely, and counts the tokens that it read."""

    def __init__(self, likely: str, tokenizer: str, fails: bool = False, **knobs: Any) -> None:
        super().__init__(ScriptedEngineConfig(tokenizer=tokenizer, **knobs))
        self.format = ChatFormat.load(tokenizer)
        self.likely = list(self.format.target_ids(MESSAGES, likely))
        self.num_read, self.fails = 0, fails

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        if self.fails:
            raise EngineError("cannot score")
        self.num_read += len(prompt_ids) + len(continuation_ids)
        return [-0.1 if list(continuation_ids) == self.likely else -2.0] * len(continuation_ids)


def test_a_tie_goes_to_the_likelier_answer_and_its_scoring_is_paid_for(chatml_tokenizer: str) -> None:
    engine = ScoringEngine("B", chatml_tokenizer, answers=("A", "B", "C", "A", "B"))
    scoring = Role(engine=engine, format=engine.format)
    end = finished(run_plan(Plan(num_proposals=5, aggregator="vote"), scoring))
    assert (end.answer.text, end.answer.inputs) == ("B", (1, 4))
    assert end.usage[1].prompt_tokens == engine.num_read > 0


def test_a_clear_majority_is_not_scored(chatml_tokenizer: str) -> None:
    engine = ScoringEngine("B", chatml_tokenizer, answers=("A", "A", "B"))
    end = finished(run_plan(Plan(num_proposals=3, aggregator="vote"), Role(engine=engine, format=engine.format)))
    assert (end.answer.text, engine.num_read) == ("A", 0)


def test_a_tie_that_cannot_be_scored_goes_to_the_answer_that_came_first(chatml_tokenizer: str) -> None:
    engine = ScoringEngine("B", chatml_tokenizer, fails=True, answers=("A", "B"))
    plan = Plan(num_proposals=2, aggregator="vote")
    assert finished(run_plan(plan, Role(engine=engine, format=engine.format))).answer.text == "A"
    assert finished(run_plan(plan, role(scripted(answers=("A", "B"))))).answer.text == "A"


# ── hedging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class SlowFirstTime(StallingEngine):
    """Stalls in the first request as configured, and in no later one."""

    async def _write(self, request: Any, index: int, emit: Any) -> None:
        if request is not self.requests[0]:
            return await ScriptedEngine._write(self, request, index, emit)
        await super()._write(request, index, emit)


def test_what_is_unwritten_after_a_while_is_asked_again_with_the_same_seeds() -> None:
    engine = SlowFirstTime(stall_on={1, 3}, stall_after=2, num_tokens=5)
    aggregator = scripted()
    events = run_plan(Plan(num_proposals=4, hedge_s=0.2), engine, aggregator)
    first, second = engine.requests
    assert second.seeds == (first.seeds[1], first.seeds[3])
    assert [answer.index for answer in drafts(events, 0)] == [0, 1, 2, 3]
    usage = finished(events).usage[0]
    assert (usage.num_answers, usage.num_failed, usage.num_cancelled) == (4, 0, 2)
    assert usage.completion_tokens == engine.num_tokens == 4 * 5 + 2 * 2
    assert usage.prompt_tokens == engine.num_prompt_tokens
    assert engine.num_running == 0
    assert asked(aggregator) == [1]


def test_a_layer_done_in_time_is_not_asked_again() -> None:
    engine = scripted()
    run_plan(Plan(num_proposals=3, hedge_s=5), engine)
    assert asked(engine) == [3, 1]


def test_a_second_copy_that_fails_leaves_the_first_one_writing() -> None:
    class FailingCopies(ScriptedEngine):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            if request.request_id.endswith("/hedge"):
                raise EngineError("no replica free")
            async for event in super().generate(request):
                yield event

    engine = FailingCopies(ScriptedEngineConfig(num_tokens=3, seconds_per_token=0.1))
    end = finished(run_plan(Plan(num_proposals=2, hedge_s=0.05), engine, scripted()))
    assert (end.usage[0].num_answers, end.usage[0].num_failed, end.usage[0].num_cancelled) == (2, 0, 0)
