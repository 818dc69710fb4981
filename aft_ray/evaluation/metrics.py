"""Quality and cost of one system's answers.

    answers = score_answers(rows)                    rows of `SCORED_ANSWERS`
    metrics = system_metrics("aft", answers)

`single` is the mean over all layer-0 drafts, taken per prompt and then over prompts. A draft of layer 0 is sampled
exactly as a plain answer of the same model is (same prompt, same `proposal` sampling), so this is an unbiased estimate
of the model at L=0, with K samples per prompt instead of one and no further calls. It stays unbiased only as far as
no draft failed, came back empty, or was cancelled by a deadline; those are counted (`num_missing_drafts`).

`best_draft` takes the best-scored draft of each prompt: an *oracle*, since picking it needs the score. It bounds what
choosing among the drafts could give; it is no system.

Where a verifier scores, an answer is right when its score reaches `PASS_SCORE`; a reward model or a length says nothing
about right and wrong. None (no score) stays out of every mean and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aft_ray.config.data import is_verifier
from aft_ray.evaluation.statistics import Estimate, estimate, estimate_share, paired_difference
from aft_ray.inference.events import LayerUsage

PASS_SCORE = 1.0
"""A verifier's scores are shares of what was asked for, in 0..1; an answer is right when all of it is met."""


@dataclass(frozen=True, kw_only=True)
class ScoredAnswer:
    """The scored answer to one prompt."""

    prompt_id: str
    draft_scores: tuple[float | None, ...]
    """Scores of the usable drafts of layer 0, in their order; None for a draft without a score. Empty at L=0."""
    num_missing_drafts: int
    """Drafts that failed, were empty or were cancelled."""
    draft_tokens: tuple[int, ...]
    final_score: float | None
    final_tokens: int
    usage: tuple[LayerUsage, ...]
    seconds: float
    is_checked: bool = True
    """Whether a verifier gave the scores, so that one of `PASS_SCORE` means a right answer."""

    @property
    def single_score(self) -> float | None:
        """The mean over the drafts that have a score; at L=0 the score of the one answer."""
        scores = _present(self.draft_scores) if len(self.usage) > 1 else _present([self.final_score])
        return sum(scores) / len(scores) if scores else None


@dataclass(frozen=True, kw_only=True)
class Flips:
    """How right and wrong drafts relate to final answers. A pair is (draft, its prompt's final answer), both scored."""

    right_to_right: int = 0
    right_to_wrong: int = 0
    wrong_to_right: int = 0
    wrong_to_wrong: int = 0
    all_wrong: int = 0
    """Prompts without any right draft."""
    all_wrong_to_right: int = 0
    """Number of those prompts with a right final answer, which no choice among the drafts could give."""
    all_right: int = 0
    all_right_to_wrong: int = 0

    @property
    def num_pairs(self) -> int:
        return self.right_to_right + self.right_to_wrong + self.wrong_to_right + self.wrong_to_wrong


@dataclass(frozen=True, kw_only=True)
class SystemMetrics:
    """The metrics of one system. Every mean is over prompts."""

    system: str
    num_layers: int
    num_proposals: int
    """Drafts asked for per prompt; 0 at L=0."""
    num_prompts: int
    num_failed: int
    """Prompts without any answer; the means leave them out."""
    num_missing_drafts: int
    """Drafts that failed, were empty or were cancelled."""
    num_unscored_drafts: int
    """Usable drafts without a score."""
    num_unscored_finals: int
    single: Estimate
    final: Estimate
    best_draft: Estimate
    gain: Estimate
    """final - single, paired by prompt. Empty at L=0."""
    single_pass: Estimate
    """Share of right answers, over the prompts that a verifier checks, as in the two fields below."""
    final_pass: Estimate
    best_draft_pass: Estimate
    flips: Flips
    draft_tokens: Estimate
    final_tokens: Estimate
    seconds: Estimate
    """Seconds per prompt, as the client measured them."""
    layers: tuple[LayerUsage, ...]
    """Usage by layer, summed over prompts."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of two systems on the prompts that both answered."""

    first: str
    second: str
    of: Literal["single", "final"]
    difference: Estimate
    """first - second."""


def score_answers(rows: Iterable[Mapping[str, Any]]) -> list[ScoredAnswer]:
    """Return the scores of every usable draft of layer 0 and of every final answer."""
    return [_score_answer(row) for row in rows]


def _score_answer(row: Mapping[str, Any]) -> ScoredAnswer:
    usage = tuple(LayerUsage(**layer) for layer in row["usage"])
    drafts = [draft for draft in row["layers"][0] if not draft["error"]] if len(usage) > 1 else []
    return ScoredAnswer(
        prompt_id=row["prompt_id"],
        draft_scores=tuple(draft["score"] for draft in drafts),
        num_missing_drafts=usage[0].num_failed + usage[0].num_cancelled if len(usage) > 1 else 0,
        draft_tokens=tuple(draft["num_tokens"] for draft in drafts),
        final_score=row["answer_score"],
        final_tokens=usage[-1].completion_tokens,
        usage=usage,
        seconds=row["seconds"],
        is_checked=is_verifier(row["scorer"]),
    )


def system_metrics(
    system: str, answers: Sequence[ScoredAnswer], *, num_failed: int = 0, num_resamples: int = 2000, seed: int = 0
) -> SystemMetrics:
    """Compute all metrics of one system. `num_failed` counts prompts that got no answer at all."""

    def over_prompts(values: Sequence[float | None]) -> Estimate:
        return estimate(values, num_resamples=num_resamples, seed=seed)

    aggregated = [answer for answer in answers if len(answer.usage) > 1]
    best = [max(_present(answer.draft_scores), default=None) for answer in aggregated]
    single, final = [answer.single_score for answer in answers], [answer.final_score for answer in answers]
    checked = [answer for answer in answers if answer.is_checked]
    checked_best = [max(_present(a.draft_scores), default=None) for a in checked if len(a.usage) > 1]
    return SystemMetrics(
        system=system,
        num_layers=max((len(answer.usage) - 1 for answer in answers), default=0),
        num_proposals=max((len(a.draft_scores) + a.num_missing_drafts for a in answers), default=0),
        num_prompts=len(answers),
        num_failed=num_failed,
        num_missing_drafts=sum(answer.num_missing_drafts for answer in answers),
        num_unscored_drafts=sum(answer.draft_scores.count(None) for answer in answers),
        num_unscored_finals=final.count(None),
        single=over_prompts(single),
        final=over_prompts(final),
        best_draft=over_prompts(best),
        gain=paired_difference(
            [answer.final_score for answer in aggregated],
            [answer.single_score for answer in aggregated],
            num_resamples=num_resamples,
            seed=seed,
        ),
        single_pass=over_prompts([_pass_share(answer) for answer in checked]),
        final_pass=estimate_share([_is_right(answer.final_score) for answer in checked]),
        best_draft_pass=estimate_share([_is_right(value) for value in checked_best]),
        flips=count_flips(answer for answer in aggregated if answer.is_checked),
        draft_tokens=over_prompts([_mean(answer.draft_tokens) for answer in aggregated]),
        final_tokens=over_prompts([float(answer.final_tokens) for answer in answers]),
        seconds=over_prompts([answer.seconds for answer in answers]),
        layers=sum_usage([answer.usage for answer in answers]),
    )


def compare(
    first: tuple[str, Sequence[ScoredAnswer]],
    second: tuple[str, Sequence[ScoredAnswer]],
    *,
    of: Literal["single", "final"] = "final",
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Return first - second, paired by prompt id. Prompts that only one of them answered are left out and counted."""
    scores = [
        {a.prompt_id: a.single_score if of == "single" else a.final_score for a in side[1]} for side in (first, second)
    ]
    prompt_ids = sorted(scores[0].keys() | scores[1].keys())
    difference = paired_difference(
        [scores[0].get(prompt_id) for prompt_id in prompt_ids],
        [scores[1].get(prompt_id) for prompt_id in prompt_ids],
        num_resamples=num_resamples,
        seed=seed,
    )
    return Comparison(first=first[0], second=second[0], of=of, difference=difference)


def count_flips(answers: Iterable[ScoredAnswer]) -> Flips:
    """Count flips draft by draft and prompt by prompt, without prompts that lack a scored final answer or draft."""
    counts: dict[str, int] = {}
    for answer in answers:
        drafts = [score >= PASS_SCORE for score in _present(answer.draft_scores)]
        if answer.final_score is None or not drafts:
            continue
        final = answer.final_score >= PASS_SCORE
        names = [f"{_word(draft)}_to_{_word(final)}" for draft in drafts]
        if len(set(drafts)) == 1:
            names.append(f"all_{_word(drafts[0])}")
            names += [f"all_{_word(drafts[0])}_to_{_word(final)}"] if final != drafts[0] else []
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    return Flips(**counts)


def sum_usage(usages: Iterable[Sequence[LayerUsage]]) -> tuple[LayerUsage, ...]:
    """Return the summed usage of many prompts by layer."""
    by_layer: dict[int, list[LayerUsage]] = {}
    for usage in usages:
        for layer in usage:
            by_layer.setdefault(layer.layer, []).append(layer)
    return tuple(
        LayerUsage(
            layer=layer,
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            completion_tokens=sum(part.completion_tokens for part in parts),
            reasoning_tokens=sum(part.reasoning_tokens for part in parts),
            cached_tokens=sum(part.cached_tokens for part in parts),
            num_answers=sum(part.num_answers for part in parts),
            num_failed=sum(part.num_failed for part in parts),
            num_cancelled=sum(part.num_cancelled for part in parts),
            seconds=sum(part.seconds for part in parts),
        )
        for layer, parts in sorted(by_layer.items())
    )


def _word(right: bool) -> str:
    return "right" if right else "wrong"


def _is_right(score: float | None) -> bool | None:
    return None if score is None else score >= PASS_SCORE


def _pass_share(answer: ScoredAnswer) -> float | None:
    scores = answer.draft_scores if len(answer.usage) > 1 else (answer.final_score,)
    return _mean([float(score >= PASS_SCORE) for score in _present(scores)])


def _present(scores: Iterable[float | None]) -> list[float]:
    return [score for score in scores if score is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
