"""The paper's questions, and how the answers of all seeds decide them.

Every model is evaluated twice. At L=2, the answers of layer 1 are aggregations at L=1, and the final answer is an
aggregation at L=2; votes and oracle are taken over the same K drafts, or over the K aggregations of layer 1. At L=0 it
answers once, sampled as the aggregations are: drafts have a higher temperature, so that they differ, and are worse.

A difference is called higher or lower when its 95 % interval over the questions of all seeds excludes zero and every
seed alone has the same sign. Each seed draws its own questions, so the interval covers questions and seeds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aft_ray.evaluation.perplexity import TargetScore
from aft_ray.evaluation.statistics import Estimate, estimate, estimate_ratio, paired_difference
from aft_ray.inference.answers import final_number

Way = Literal["draft", "single", "vote", "best", "L=1", "vote L=1", "L=2"]
WAYS: tuple[Way, ...] = ("draft", "single", "vote", "L=1", "vote L=1", "L=2", "best")
"""`draft` is the mean over the K drafts, and `vote` the answer that most of them give (the first of them in a tie).
`single` is the answer at L=0.
`L=1` is the mean over the K aggregations of layer 1, and `vote L=1` the answer that most of those give. `L=2` is the
final answer. `best` says whether any draft is right, which only an oracle knows."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question answered by one system: how right each way of answering is, from 0 to 1."""

    system: str
    seed: int
    prompt_id: str
    right: Mapping[Way, float]

    @classmethod
    def of(cls, row: Mapping[str, Any], single: str, system: str, seed: int) -> Answered:
        """Read a row of `ANSWERS` at L=2 and the answer at L=0. A draft that failed counts as wrong."""
        wanted = final_number(row["reference"])
        drafts, aggregations = ([final_number(draft["text"]) for draft in layer] for layer in row["layers"][:2])
        right: dict[Way, float] = {
            "draft": sum(number == wanted for number in drafts) / len(drafts),
            "single": float(final_number(single) == wanted),
            "vote": float(_winner(drafts) == wanted),
            "best": float(wanted in drafts),
            "L=1": sum(number == wanted for number in aggregations) / len(aggregations),
            "vote L=1": float(_winner(aggregations) == wanted),
            "L=2": float(final_number(row["answer"]) == wanted),
        }
        return cls(system=system, seed=seed, prompt_id=row["prompt_id"], right=right)


def _winner(numbers: Sequence[Any]) -> Any:
    """Return the most frequent number, the first in a tie; None when there is no number."""
    votes = Counter(number for number in numbers if number is not None)
    return votes.most_common(1)[0][0] if votes else None


Side = tuple[str, Way]
"""(system, way of answering)"""


@dataclass(frozen=True)
class Question:
    """A question that a difference answers, and what the paper found."""

    text: str
    first: Side
    second: Side
    paper: Literal["higher", "no gain"] | None = None
    """None: the paper does not say."""


QUESTIONS = (
    Question("Does the untrained model gain from aggregating?", ("base", "L=1"), ("base", "single")),
    Question("Does SFT + aggregation gain over SFT alone?", ("sft", "L=1"), ("sft", "single"), "no gain"),
    Question("Does AFT + aggregation beat AFT alone?", ("aft", "L=1"), ("aft", "single"), "higher"),
    Question("Does AFT + aggregation beat SFT alone?", ("aft", "L=1"), ("sft", "single"), "higher"),
    Question("Does AFT + aggregation beat SFT + aggregation?", ("aft", "L=1"), ("sft", "L=1"), "higher"),
    Question("Does AFT aggregate better than the untrained model?", ("aft", "L=1"), ("base", "L=1")),
    Question("Does it beat a vote over the same K drafts?", ("aft", "L=1"), ("aft", "vote")),
    Question("Does it beat a vote over K drafts of SFT?", ("aft", "L=1"), ("sft", "vote")),
    Question("Does a vote over K aggregations beat one over the K drafts?", ("aft", "vote L=1"), ("aft", "vote")),
    Question("Does that vote beat one over K drafts of SFT?", ("aft", "vote L=1"), ("sft", "vote")),
    Question("Does a second layer add to the first?", ("aft", "L=2"), ("aft", "L=1"), "higher"),
    Question("Does AFT still answer alone as SFT does?", ("aft", "single"), ("sft", "single")),
    Question("Does joint training answer alone as SFT does?", ("joint", "single"), ("sft", "single")),
    Question("Does joint training aggregate better than AFT?", ("joint", "L=1"), ("aft", "L=1")),
    Question("Does joint training + aggregation beat SFT alone?", ("joint", "L=1"), ("sft", "single")),
    Question("Is AFT better than without proposals?", ("aft", "L=1"), ("no_proposals", "L=1"), "higher"),
    Question("Is AFT better than with pseudo targets?", ("aft", "L=1"), ("pseudo", "L=1"), "higher"),
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The answer to one question."""

    question: Question
    pooled: Estimate
    """first - second over the questions of all seeds."""
    by_seed: Mapping[int, float]

    @property
    def verdict(self) -> str:
        """`higher`, `lower` or `no difference shown`."""
        mean = self.pooled.mean
        same_sign = mean is not None and all(value * mean > 0 for value in self.by_seed.values())
        if mean is None or not self.pooled.excludes_zero or not same_sign:
            return "no difference shown"
        return "higher" if mean > 0 else "lower"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How often one way of answering is right."""

    system: str
    way: Way
    pooled: Estimate
    by_seed: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Surprise:
    """The perplexity of the targets under one condition, over all seeds."""

    condition: str
    nats_per_token: Estimate
    difference: Estimate
    """Nats per token minus those of the first condition, paired by target."""

    @property
    def perplexity(self) -> float | None:
        return None if self.nats_per_token.mean is None else math.exp(self.nats_per_token.mean)


@dataclass(frozen=True, kw_only=True)
class Study:
    """All results of a study."""

    seeds: tuple[int, ...]
    num_questions: int
    """Per seed."""
    rates: tuple[Rate, ...]
    differences: tuple[Difference, ...]
    surprises: tuple[Surprise, ...]
    pseudo_right: Estimate
    """Share of right answers among the pseudo targets, which no verifier has filtered; no mean without such targets."""

    def rate(self, system: str, way: Way) -> Rate:
        return next(rate for rate in self.rates if (rate.system, rate.way) == (system, way))

    def difference(self, first: Side, second: Side) -> Difference:
        """Return the answer to the question that compares these two sides."""
        return next(d for d in self.differences if (d.question.first, d.question.second) == (first, second))


def study_of(
    answered: Sequence[Answered],
    scores: Mapping[int, Sequence[TargetScore]],
    pseudo_right: Sequence[bool],
    num_resamples: int,
) -> Study:
    """Compute rates and differences over the answers of all seeds."""
    systems = list(dict.fromkeys(one.system for one in answered))
    seeds = tuple(dict.fromkeys(one.seed for one in answered))
    values = {(one.system, way, one.seed, one.prompt_id): one.right[way] for one in answered for way in WAYS}
    asked = sorted({(one.seed, one.prompt_id) for one in answered})

    def of(side: Side, seed: int | None = None) -> list[float | None]:
        return [values.get((*side, *key)) for key in asked if seed in (None, key[0])]

    def mean(numbers: Sequence[float | None]) -> float:
        present = [number for number in numbers if number is not None]
        return sum(present) / len(present) if present else math.nan

    rates = [
        Rate(
            system=system,
            way=way,
            pooled=estimate(of((system, way)), num_resamples=num_resamples),
            by_seed={seed: mean(of((system, way), seed)) for seed in seeds},
        )
        for system in systems
        for way in WAYS
    ]
    differences = [
        Difference(
            question=question,
            pooled=paired_difference(of(question.first), of(question.second), num_resamples=num_resamples),
            by_seed={seed: mean(of(question.first, seed)) - mean(of(question.second, seed)) for seed in seeds},
        )
        for question in QUESTIONS
        if {question.first[0], question.second[0]} <= set(systems)
    ]
    return Study(
        seeds=seeds,
        num_questions=len(asked) // len(seeds),
        rates=tuple(rates),
        differences=tuple(differences),
        surprises=_surprises(scores, num_resamples),
        pseudo_right=estimate([float(right) for right in pseudo_right], num_resamples=num_resamples),
    )


def _surprises(scores: Mapping[int, Sequence[TargetScore]], num_resamples: int) -> tuple[Surprise, ...]:
    by_condition: dict[str, dict[tuple[int, str], TargetScore]] = {}
    for seed, of_seed in scores.items():
        for score in of_seed:
            by_condition.setdefault(score.condition, {})[seed, score.prompt_id] = score
    first = next(iter(by_condition.values()), {})
    rows = sorted(row for row in first if all(row in of and of[row].nats is not None for of in by_condition.values()))
    num_tokens = [float(first[row].num_tokens) for row in rows]

    def per_token(nats: Sequence[float]) -> Estimate:
        return estimate_ratio(nats, num_tokens, num_resamples=num_resamples)

    return tuple(
        Surprise(
            condition=name,
            nats_per_token=per_token([one[row].nats or 0.0 for row in rows]),
            difference=per_token([(one[row].nats or 0.0) - (first[row].nats or 0.0) for row in rows]),
        )
        for name, one in by_condition.items()
    )
