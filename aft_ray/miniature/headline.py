"""The study's answer in a few sentences and one chart, for a reader who does not know the method yet."""

from __future__ import annotations

from collections.abc import Callable

from aft_ray.evaluation.charts import Point, interval_chart
from aft_ray.evaluation.statistics import Estimate
from aft_ray.miniature.answers import Difference, Side, Study, Way

SHOWN: dict[Way, str] = {
    "single": "a single answer",
    "vote": "majority vote over the drafts",
    "L=1": "aggregated from the same drafts",
}
MODELS = {"base": "base model, untrained", "sft": "after ordinary fine-tuning (SFT)", "aft": "after AFT"}


def headline(study: Study) -> list[str]:
    """Return what the study says about aggregation fine-tuning, in up to four sentences.

    Each sentence says "more" or "fewer" only where `Difference.verdict` does. A comparison with a model that the study
    did not train is left out.
    """
    compare: list[tuple[Side, Side, Callable[[Study, Difference], str]]] = [
        (("aft", "L=1"), ("aft", "single"), _aft_gains),
        (("aft", "L=1"), ("aft", "vote"), _aft_against_vote),
        (("sft", "L=1"), ("sft", "single"), _sft_gains),
        (("aft", "L=1"), ("sft", "single"), _aft_against_sft),
    ]
    there = {(one.question.first, one.question.second): one for one in study.differences}
    return [say(study, there[first, second]) for first, second, say in compare if (first, second) in there]


def _aft_gains(study: Study, gain: Difference) -> str:
    opening = {
        "higher": "Training to aggregate works here",
        "lower": "Training to aggregate does harm here",
    }.get(gain.verdict, "This study does not show that training to aggregate works")
    return (
        f"{opening}: after aggregation fine-tuning (AFT) the model is right on {_share(study, ('aft', 'L=1'))} of the "
        f"questions when it aggregates its own drafts, and on {_share(study, ('aft', 'single'))} when it answers once "
        f"({_points(gain.pooled)})."
    )


def _aft_against_vote(study: Study, gain: Difference) -> str:
    reading = {
        "higher": "Aggregating also beats a majority vote over the same drafts",
        "lower": "A majority vote over the same drafts is better still",
    }.get(gain.verdict, "No difference is shown between aggregating and a majority vote over the same drafts")
    return f"{reading}, which is right on {_share(study, ('aft', 'vote'))} ({_points(gain.pooled)})."


def _sft_gains(study: Study, gain: Difference) -> str:
    reading = {
        "higher": "Ordinary fine-tuning (SFT) on the same questions makes aggregating pay too",
        "lower": "Ordinary fine-tuning (SFT) on the same questions does not teach it: showing it drafts makes it worse",
    }.get(gain.verdict, "Ordinary fine-tuning (SFT) on the same questions does not teach it: no gain is shown")
    skill = study.difference(("aft", "L=1"), ("sft", "L=1"))
    compared = {
        "higher": "Given drafts, AFT is right more often than SFT",
        "lower": "Given drafts, AFT is right less often than SFT",
    }.get(skill.verdict, "Given drafts, no difference is shown between AFT and SFT")
    return (
        f"{reading}, {_share(study, ('sft', 'L=1'))} with drafts and {_share(study, ('sft', 'single'))} alone "
        f"({_points(gain.pooled)}). {compared} ({_points(skill.pooled)})."
    )


def _aft_against_sft(study: Study, gain: Difference) -> str:
    reading = {
        "higher": "AFT with aggregation is right more often than",
        "lower": "AFT with aggregation is right less often than",
    }.get(gain.verdict, "No difference is shown between AFT with aggregation and")
    return f"{reading} a single answer of the SFT model ({_points(gain.pooled)})."


def _share(study: Study, side: Side) -> str:
    mean = study.rate(*side).pooled.mean
    return "no answer" if mean is None else f"{100 * mean:.0f} %"


def _points(difference: Estimate) -> str:
    """Return a difference of shares in percentage points with its interval."""
    if difference.mean is None:
        return "no difference measured"
    mean = f"{100 * difference.mean:+.1f} percentage points"
    if difference.low is None or difference.high is None:
        return f"{mean}, too few different values for an interval"
    return f"{mean}, 95 % interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"


def headline_points(study: Study) -> list[Point]:
    """Return the share of right answers of base, SFT and AFT for the three ways of answering, with intervals."""
    return [
        Point(row=name, series=SHOWN[way], mean=rate.mean, low=rate.low, high=rate.high)
        for way in SHOWN
        for system, name in MODELS.items()
        for rate in [one.pooled for one in study.rates if (one.system, one.way) == (system, way)]
        if rate.mean is not None
    ]


def headline_chart(study: Study) -> str:
    """Return `headline_points` as inline SVG."""
    label = "Share of right answers of each model: single, by vote, and aggregated from the same drafts; 95 % intervals"
    return interval_chart("headline", label, headline_points(study), "share of right answers")
