"""Perplexity against values computed by hand."""

from __future__ import annotations

import math
from asyncio import run
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from aft_ray.config import ScriptedEngineConfig, TemplatesConfig
from aft_ray.engines.base import Engine, EngineEvent, EngineInfo, GenerateRequest
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.errors import EngineError
from aft_ray.evaluation.perplexity import TargetScore, score_target, summarise
from aft_ray.evaluation.perplexity_stage import PerplexityWorker

Row = tuple[list[int], list[int]]
ROWS: list[Row] = [([1, 2], [5, 6, 7]), ([3], [8])]


class PromptLengthEngine:
    """A scripted model: every target token has log-probability -len(prompt); with an adapter half of that."""

    def __init__(self, fail_on_length: int | None = None, short: bool = False, dead: bool = False) -> None:
        self.dead = dead
        self.fail_on_length = fail_on_length
        self.short = short

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(model="scripted", tokenizer=None, max_model_len=4096, takes_messages=True)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        raise EngineError("this scripted model only scores")
        yield

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        if len(prompt_ids) == self.fail_on_length:
            raise EngineError("scripted failure")
        log_prob = -len(prompt_ids) / (2 if adapter else 1)
        return [log_prob] * (len(continuation_ids) - self.short)

    async def check(self) -> None:
        if self.dead:
            raise EngineError("the model's process ended")

    async def close(self) -> None:
        return None


def scores_of(
    engine: Engine, name: str = "prompt only", rows: Sequence[Row] = ROWS, adapter: str | None = None
) -> list[TargetScore]:
    made = []
    for number, (prompt_ids, target_ids) in enumerate(rows):
        nats, error = run(score_target(engine, prompt_ids, target_ids, adapter))
        made.append(
            TargetScore(condition=name, prompt_id=f"p-{number}", nats=nats, num_tokens=len(target_ids), error=error)
        )
    return made


def test_a_nat_per_token_is_perplexity_e() -> None:
    [one] = summarise(scores_of(ScriptedEngine(ScriptedEngineConfig())))
    assert one.perplexity == pytest.approx(math.e)
    assert (one.nats_per_token.mean, one.nats_per_token.num, one.num_tokens) == (1.0, 2, 4)
    assert one.low is None  # both targets say the same: the sample cannot tell


def test_tokens_weigh_the_same_and_rows_do_not() -> None:
    engine = PromptLengthEngine()
    base, adapted = summarise([*scores_of(engine, "base"), *scores_of(engine, "adapter", adapter="runs/aft")])
    assert base.nats_per_token.mean == pytest.approx((3 * 2 + 1 * 1) / 4)
    assert base.perplexity == pytest.approx(math.exp(7 / 4))
    assert adapted.perplexity == pytest.approx(math.exp(7 / 8))
    assert adapted.difference.mean == pytest.approx(-7 / 8)
    assert base.low == pytest.approx(math.e) and base.high == pytest.approx(math.exp(2))
    assert base.difference.mean == 0


def test_a_row_that_one_condition_could_not_score_is_left_out_of_all() -> None:
    longer: list[Row] = [([1, 2, 3, 4], [5, 6, 7]), ([3, 3], [8])]
    engine = PromptLengthEngine(fail_on_length=4)
    scores = [*scores_of(engine), *scores_of(engine, "with proposals", longer)]
    assert [score.error for score in scores] == [None, None, "EngineError: scripted failure", None]
    first, second = summarise(scores)
    assert (first.nats_per_token.mean, second.nats_per_token.mean) == (1.0, 2.0)
    assert (first.nats_per_token.num, first.nats_per_token.num_missing, first.num_tokens) == (1, 1, 1)


def test_a_target_that_only_one_model_has_scored_is_left_out_of_all() -> None:
    engine = PromptLengthEngine()
    first, second = summarise([*scores_of(engine), *scores_of(engine, "another model", ROWS[:1])])
    assert (first.num_tokens, second.num_tokens, second.nats_per_token.num_missing) == (3, 3, 1)


def test_too_few_log_probabilities_are_a_failed_row_and_no_small_perplexity() -> None:
    scores = scores_of(PromptLengthEngine(short=True))
    assert scores[0].error == "the engine gave 2 log-probabilities for 3 target tokens"
    [one] = summarise(scores)
    assert (one.perplexity, one.nats_per_token.num, one.nats_per_token.num_missing) == (None, 0, 2)


def test_a_dead_engine_ends_the_work_and_no_target_is_blamed() -> None:
    with pytest.raises(EngineError, match="the model's process ended"):
        scores_of(PromptLengthEngine(fail_on_length=1, dead=True))


def test_no_targets_give_no_perplexities() -> None:
    assert summarise([]) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target_filter": "rejected by the verifier"}, "rejected by the verifier"),
        ({"target": {"text": " "}}, "empty target"),
        ({"split": "train"}, "training prompt"),
    ],
    ids=["rejected", "empty", "training"],
)
def test_only_held_out_targets_that_may_be_trained_on_are_scored(change: dict[str, Any], reason: str) -> None:
    async def no_engine() -> Engine:
        raise AssertionError("nothing is to be scored")

    worker = PerplexityWorker(no_engine, [], TemplatesConfig(), max_length=64)
    row = {"prompt_id": "p", "split": "held_out", "target": {"text": "Paris."}, "target_filter": None}
    done = run(worker.process({**row, **change}))
    assert (done.rows, done.filtered) == ([], reason)
