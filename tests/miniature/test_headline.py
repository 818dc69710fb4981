"""The headline: what it says follows the verdicts, whatever they are."""

from __future__ import annotations

import pytest

from aft_ray.miniature.answers import WAYS, Answered, Study, study_of
from aft_ray.miniature.headline import headline, headline_chart

NUM = 60


def study(aft: float, vote: float = 0.5, sft: float = 0.5, single: float = 0.5) -> Study:
    """One seed. `aft`, `sft`: shares of right aggregations; `vote`, `single`: of the vote and the single answers."""
    answered = []
    for number in range(NUM):

        def right(share: float, number: int = number) -> float:
            return float((number * 7) % NUM < share * NUM)

        plain = dict.fromkeys(WAYS, right(single))
        ways = {"sft": {**plain, "L=1": right(sft)}, "aft": {**plain, "vote": right(vote), "L=1": right(aft)}}
        answered += [
            Answered(system=name, right=ways[name], seed=1, prompt_id=f"p-{number}") for name in ("sft", "aft")
        ]
    return study_of(answered, {1: []}, [], num_resamples=200)


@pytest.mark.parametrize(
    ("shares", "sentences"),
    [
        (
            {"aft": 0.9, "vote": 0.6, "sft": 0.2},
            (
                "Training to aggregate works here: ",
                "Aggregating also beats a majority vote",
                "does not teach it: showing it drafts makes it worse, 20 % with drafts and 50 % alone (-30.0",
                "AFT with aggregation is right more often than a single answer of the SFT model (+40.0",
            ),
        ),
        (
            {"aft": 0.5, "vote": 0.9},
            (
                "This study does not show that training to aggregate works: ",
                "A majority vote over the same drafts is better still, which is right on 90 % (-40.0",
                "does not teach it: no gain is shown",
                "No difference is shown between AFT with aggregation and a single answer",
            ),
        ),
        (
            {"aft": 0.2, "vote": 0.2, "sft": 0.9},
            (
                "Training to aggregate does harm here: ",
                "No difference is shown between aggregating and a majority vote",
                "makes aggregating pay too",
                "AFT with aggregation is right less often than",
            ),
        ),
    ],
)
def test_every_sentence_follows_its_verdict(shares: dict[str, float], sentences: tuple[str, ...]) -> None:
    said = headline(study(**shares))
    assert len(said) == len(sentences)
    for sentence, part in zip(said, sentences, strict=True):
        assert part in sentence


def test_a_difference_comes_with_its_interval() -> None:
    first = headline(study(0.9))[0]
    assert "right on 90 % of the questions when it aggregates its own drafts, and on 50 % when it answers once" in first
    assert "+40.0 percentage points, 95 % interval +" in first


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"aft": 0.5, "sft": 0.2}, "more often than SFT (+30.0"),
        ({"aft": 0.2, "sft": 0.5}, "less often than SFT (-30.0"),
    ],
)
def test_it_says_who_makes_more_of_the_drafts(shares: dict[str, float], words: str) -> None:
    assert f"Given drafts, AFT is right {words}" in headline(study(**shares))[2]


def test_the_chart_has_the_ways_of_answering_of_every_model() -> None:
    chart = headline_chart(study(0.9))
    for words in ("a single answer", "majority vote", "aggregated", "after AFT", "(SFT)"):
        assert words in chart
    assert "untrained" not in chart  # this study has no base model
