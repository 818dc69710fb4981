"""How likely the targets are: perplexity under prompt only and under prompt + proposals, before and after training.

The paper's Figure 6 (arXiv 2501.11877): with the proposals in front of it, a target is far less surprising than from
the prompt alone. `perplexity_stage.py` scores every held-out target under each condition, and `summarise` compares the
conditions on the same tokens: a target that one condition could not score is left out of all of them, and counted.

    nats per token = sum of -log p over all target tokens / number of target tokens;   perplexity = exp(nats per token)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.engines.base import Engine
from aft_ray.errors import EngineError, PromptTooLong
from aft_ray.evaluation.statistics import Estimate, estimate_ratio


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """The score of one target under one condition."""

    condition: str
    prompt_id: str
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


async def score_target(
    engine: Engine, prompt_ids: Sequence[int], target_ids: Sequence[int], adapter: str | None
) -> tuple[float | None, str | None]:
    """Return the nats of a target and None, or None and the reason why the engine cannot score it.

    An engine that can no longer answer at all raises EngineError, so that no target is blamed for it.
    """
    try:
        return _total_nats(await engine.score(prompt_ids, target_ids, adapter), len(target_ids))
    except (EngineError, PromptTooLong) as failure:
        await engine.check()
        return None, f"{type(failure).__name__}: {failure}"


def _total_nats(log_probs: Sequence[float], num_tokens: int) -> tuple[float | None, str | None]:
    """Return (nats, None), or (None, reason) when the engine cannot score the target."""
    if len(log_probs) != num_tokens:
        return None, f"the engine gave {len(log_probs)} log-probabilities for {num_tokens} target tokens"
    total = -math.fsum(log_probs)
    return (total, None) if math.isfinite(total) else (None, f"the engine's log-probabilities sum to {-total}")


def summarise(scores: Sequence[TargetScore], *, num_resamples: int = 2000, seed: int = 0) -> list[ConditionPerplexity]:
    """Return the perplexity per condition, in the order in which the conditions first appear."""
    by_condition: dict[str, dict[str, TargetScore]] = {}
    for score in scores:
        by_condition.setdefault(score.condition, {})[score.prompt_id] = score
    rows = sorted({score.prompt_id for score in scores})
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
