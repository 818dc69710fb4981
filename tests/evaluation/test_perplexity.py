"""Perplexity against values computed by hand."""

from __future__ import annotations

import asyncio
import math
from asyncio import run
from collections.abc import AsyncGenerator, Sequence

import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.errors import EngineError, InputError
from aft_ray.evaluation.perplexity import ScoredCondition, ScoredRow, score_targets, summarise, target_perplexity

ROWS: list[ScoredRow] = [([1, 2], [5, 6, 7]), ([3], [8])]


class PromptLengthEngine:
    """A scripted model: every target token has log-probability -len(prompt); with an adapter half of that."""

    def __init__(self, fail_on_length: int | None = None, short: bool = False, dead: bool = False) -> None:
        self.dead = dead
        self.fail_on_length = fail_on_length
        self.short = short
        self.num_running = 0
        self.most_at_once = 0

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(model="scripted", tokenizer=None, max_model_len=4096, takes_messages=True)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        raise EngineError("this scripted model only scores")
        yield

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        self.num_running += 1
        self.most_at_once = max(self.most_at_once, self.num_running)
        await asyncio.sleep(0.001)
        self.num_running -= 1
        if len(prompt_ids) == self.fail_on_length:
            raise EngineError("scripted failure")
        log_prob = -len(prompt_ids) / (2 if adapter else 1)
        return [log_prob] * (len(continuation_ids) - self.short)

    async def check(self) -> None:
        if self.dead:
            raise EngineError("the model's process ended")

    async def close(self) -> None:
        return None


def condition(name: str, rows: Sequence[ScoredRow] = ROWS, adapter: str | None = None) -> ScoredCondition:
    return ScoredCondition(name=name, adapter=adapter, rows=rows)


def test_a_nat_per_token_is_perplexity_e() -> None:
    [one] = run(target_perplexity(ScriptedEngine(ScriptedEngineConfig()), [condition("prompt only")]))
    assert one.perplexity == pytest.approx(math.e)
    assert (one.nats_per_token.mean, one.nats_per_token.num, one.num_tokens) == (1.0, 2, 4)
    assert one.low is None  # both targets say the same: the sample cannot tell


def test_tokens_weigh_the_same_and_rows_do_not() -> None:
    conditions = [condition("base"), condition("adapter", adapter="runs/aft")]
    base, adapted = run(target_perplexity(PromptLengthEngine(), conditions))
    assert base.nats_per_token.mean == pytest.approx((3 * 2 + 1 * 1) / 4)
    assert base.perplexity == pytest.approx(math.exp(7 / 4))
    assert adapted.perplexity == pytest.approx(math.exp(7 / 8))
    assert adapted.difference.mean == pytest.approx(-7 / 8)
    assert base.low == pytest.approx(math.e) and base.high == pytest.approx(math.exp(2))
    assert base.difference.mean == 0


def test_a_row_that_one_condition_could_not_score_is_left_out_of_all() -> None:
    longer: list[ScoredRow] = [([1, 2, 3, 4], [5, 6, 7]), ([3, 3], [8])]
    engine = PromptLengthEngine(fail_on_length=4)
    scores = run(score_targets(engine, [condition("prompt only"), condition("with proposals", longer)]))
    assert [score.error for score in scores] == [None, None, "EngineError: scripted failure", None]
    first, second = summarise(scores)
    assert (first.nats_per_token.mean, second.nats_per_token.mean) == (1.0, 2.0)
    assert (first.nats_per_token.num, first.nats_per_token.num_missing, first.num_tokens) == (1, 1, 1)


def test_too_few_log_probabilities_are_a_failed_row_and_no_small_perplexity() -> None:
    engine = PromptLengthEngine(short=True)
    scores = run(score_targets(engine, [condition("prompt only")]))
    assert scores[0].error == "the engine gave 2 log-probabilities for 3 target tokens"
    [one] = summarise(scores)
    assert (one.perplexity, one.nats_per_token.num, one.nats_per_token.num_missing) == (None, 0, 2)


def test_a_dead_engine_ends_the_work_and_no_target_is_blamed() -> None:
    engine = PromptLengthEngine(fail_on_length=1, dead=True)
    with pytest.raises(EngineError, match="the model's process ended"):
        run(score_targets(engine, [condition("prompt only")]))


def test_concurrency_is_bounded_and_progress_reaches_the_total() -> None:
    engine, seen = PromptLengthEngine(), []
    rows: list[ScoredRow] = [([1] * n, [9]) for n in range(1, 21)]
    run(
        target_perplexity(
            engine,
            [condition("a", rows), condition("b", rows)],
            max_concurrency=3,
            on_progress=lambda done, total: seen.append((done, total)),
        )
    )
    assert engine.most_at_once == 3
    assert seen == [(done, 40) for done in range(1, 41)]


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([condition("a"), condition("b", ROWS[:1])], "'b' has 1 rows, 'a' has 2"),
        ([condition("a"), condition("b", [ROWS[0], ([3], [9])])], "'b', row 1: the target differs"),
        ([condition("a", [([1], [])])], "'a', row 0: the target is empty"),
        ([condition("a"), condition("a")], "names must differ"),
    ],
    ids=["another number of rows", "another target", "an empty target", "the same name twice"],
)
def test_conditions_that_do_not_compare_are_refused(conditions: list[ScoredCondition], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(target_perplexity(ScriptedEngine(ScriptedEngineConfig()), conditions))


def test_no_targets_give_no_perplexities() -> None:
    assert run(target_perplexity(ScriptedEngine(ScriptedEngineConfig()), [condition("prompt only", [])])) == []
