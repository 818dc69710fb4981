"""How likely the targets are: perplexity under prompt only and under prompt + proposals, before and after training.

The paper's Figure 6 (arXiv 2501.11877): with the proposals in front of it, a target is far less surprising than from
the prompt alone. Each condition is a name, an adapter and one (prompt ids, target ids) row per target:

    conditions = [
        ScoredCondition(name="prompt only", adapter=None, rows=[(prompt_ids, target_ids), ...]),
        ScoredCondition(name="prompt + proposals", adapter=None, rows=[(aggregator_prompt_ids, target_ids), ...]),
        ScoredCondition(name="SFT, prompt only", adapter="runs/.../sft", rows=...),
        ScoredCondition(name="AFT, prompt + proposals", adapter="runs/.../aft", rows=...),
    ]
    perplexities = await target_perplexity(engine, conditions)

Row i is the same target in every condition, so conditions are compared on the same tokens: a row that one condition
could not score is left out of all of them, and counted.

    nats per token = sum of -log p over all target tokens / number of target tokens;   perplexity = exp(nats per token)
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from aft_ray.engines.base import Engine
from aft_ray.errors import EngineError, InputError, PromptTooLong
from aft_ray.evaluation.statistics import Estimate, estimate_ratio

ScoredRow = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, target ids)"""


@dataclass(frozen=True, kw_only=True)
class ScoredCondition:
    """One condition under which every target is scored: a model, and what it sees before the target."""

    name: str
    adapter: str | None
    """Path of a LoRA adapter, or None for the base model."""
    rows: Sequence[ScoredRow]


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """The score of one target under one condition, in plain values that a job can store and summarise later."""

    condition: str
    row: int
    nats: float | None
    """Sum of -log p over the target's tokens; None with `error` set."""
    num_tokens: int
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class ConditionPerplexity:
    """The perplexity under one condition, over the targets that every condition scored."""

    name: str
    nats_per_token: Estimate
    """`num` counts targets, `num_missing` those left out; the interval resamples targets."""
    num_tokens: int
    perplexity: float | None
    low: float | None
    high: float | None
    """95 % interval of the perplexity."""
    difference: Estimate
    """Nats per token minus those of the first condition, paired by target."""


async def target_perplexity(
    engine: Engine,
    conditions: Sequence[ScoredCondition],
    *,
    max_concurrency: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[ConditionPerplexity]:
    """Score every target under every condition and summarise. `on_progress(done, total)` after each target."""
    scores = await score_targets(engine, conditions, max_concurrency=max_concurrency, on_progress=on_progress)
    return summarise(scores, num_resamples=num_resamples, seed=seed)


async def score_targets(
    engine: Engine,
    conditions: Sequence[ScoredCondition],
    *,
    max_concurrency: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TargetScore]:
    """Return one TargetScore per condition and row, in that order, with at most `max_concurrency` scored at a time.

    A target that the engine cannot score is a TargetScore with an error; an engine that can no longer answer at all
    raises EngineError, so that no target is blamed for it.
    """
    _check_same_targets(conditions)
    total = sum(len(condition.rows) for condition in conditions)
    todo = ((condition, row) for condition in conditions for row in range(len(condition.rows)))
    done: dict[tuple[str, int], TargetScore] = {}

    async def work(todo: Iterator[tuple[ScoredCondition, int]]) -> None:
        for condition, row in todo:  # shared by the workers: each takes the next one
            done[condition.name, row] = await _score_target(engine, condition, row)
            if on_progress:
                on_progress(len(done), total)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(max_concurrency, total)):
                group.create_task(work(todo))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [done[condition.name, row] for condition in conditions for row in range(len(condition.rows))]


async def _score_target(engine: Engine, condition: ScoredCondition, row: int) -> TargetScore:
    prompt_ids, target_ids = condition.rows[row]
    nats: float | None = None
    error: str | None = None
    try:
        log_probs = await engine.score(prompt_ids, target_ids, condition.adapter)
        nats, error = _total_nats(log_probs, len(target_ids))
    except (EngineError, PromptTooLong) as failure:
        await engine.check()
        error = f"{type(failure).__name__}: {failure}"
    return TargetScore(condition=condition.name, row=row, nats=nats, num_tokens=len(target_ids), error=error)


def _total_nats(log_probs: Sequence[float], num_tokens: int) -> tuple[float | None, str | None]:
    """Return (nats, None), or (None, reason) when the engine cannot score the target."""
    if len(log_probs) != num_tokens:
        return None, f"the engine gave {len(log_probs)} log-probabilities for {num_tokens} target tokens"
    total = -math.fsum(log_probs)
    return (total, None) if math.isfinite(total) else (None, f"the engine's log-probabilities sum to {-total}")


def summarise(scores: Sequence[TargetScore], *, num_resamples: int = 2000, seed: int = 0) -> list[ConditionPerplexity]:
    """Return the perplexity per condition, in the order in which the conditions first appear."""
    by_condition: dict[str, dict[int, TargetScore]] = {}
    for score in scores:
        by_condition.setdefault(score.condition, {})[score.row] = score
    rows = sorted({score.row for score in scores})
    complete = [row for row in rows if all(row in of and of[row].nats is not None for of in by_condition.values())]
    nats = {name: [of[row].nats or 0.0 for row in complete] for name, of in by_condition.items()}
    num_tokens = [of[row].num_tokens for of in list(by_condition.values())[:1] for row in complete]

    def per_token(values: Sequence[float]) -> Estimate:
        ratio = estimate_ratio(values, num_tokens, num_resamples=num_resamples, seed=seed)
        return dataclasses.replace(ratio, num_missing=len(rows) - len(complete))

    first = next(iter(nats.values()), [])
    return [
        _perplexity_of(name, per_token(values), per_token(_minus(values, first)), sum(num_tokens))
        for name, values in nats.items()
    ]


def _perplexity_of(name: str, per_token: Estimate, difference: Estimate, num_tokens: int) -> ConditionPerplexity:
    return ConditionPerplexity(
        name=name,
        nats_per_token=per_token,
        num_tokens=num_tokens,
        perplexity=_exp(per_token.mean),
        low=_exp(per_token.low),
        high=_exp(per_token.high),
        difference=difference,
    )


def _minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def _exp(nats: float | None) -> float | None:
    return None if nats is None else math.exp(nats)


def _check_same_targets(conditions: Sequence[ScoredCondition]) -> None:
    """Check that every condition scores the same tokens, since only then can they be compared."""
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise InputError(f"conditions {names}: names must differ")
    for condition in conditions:
        first = conditions[0]
        if len(condition.rows) != len(first.rows):
            raise InputError(
                f"condition '{condition.name}' has {len(condition.rows)} rows, '{first.name}' has {len(first.rows)}: "
                "row i must be the same target in every condition"
            )
        for row, ((_, target_ids), (_, first_ids)) in enumerate(zip(condition.rows, first.rows, strict=True)):
            if not target_ids or list(target_ids) != list(first_ids):
                found = "is empty" if not target_ids else f"differs from that of '{first.name}'"
                raise InputError(f"condition '{condition.name}', row {row}: the target {found}")
