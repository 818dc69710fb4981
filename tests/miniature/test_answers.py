"""How the study reads answers: ways of answering, differences, verdicts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import load_config
from aft_ray.evaluation.perplexity import TargetScore
from aft_ray.miniature.answers import WAYS, Answered, Study, study_of
from aft_ray.miniature.page import PAGE, write_page
from aft_ray.storage import Folder

ROOT = Path(__file__).parent.parent.parent


def row(drafts: list[str], aggregations: list[str], answer: str, name: str = "p-1") -> dict[str, Any]:
    """A row of answers at L=2 to a question whose right answer is 070506."""
    layers = [[{"text": text} for text in layer] for layer in (drafts, aggregations)]
    return {"prompt_id": name, "reference": "070506", "layers": layers, "answer": answer}


def test_one_row_holds_every_way_of_answering() -> None:
    answered = Answered.of(
        row(["070506", "070504", "070504", "070506"], ["070506", "01", "01"], "070506"),
        "070504",
        "aft",
        seed=1,
    )
    rates = {"draft": 0.5, "single": 0.0, "vote": 1.0, "L=1": 1 / 3, "vote L=1": 0.0, "L=2": 1.0, "best": 1.0}
    assert answered.right == pytest.approx(rates)


@pytest.mark.parametrize(
    ("drafts", "vote", "best"),
    [
        (["070504", "070504", "070506"], 0.0, 1.0),
        (["070506", "070504"], 1.0, 1.0),  # the first in a tie
        (["070504", "070506"], 0.0, 1.0),
        (["070504", "070406", "080506"], 0.0, 0.0),  # most are right at every place, none as a whole
        (["", "--", "070506"], 1.0, 1.0),  # drafts without a number have no vote
        (["", ""], 0.0, 0.0),
    ],
)
def test_the_vote_is_over_whole_answers(drafts: list[str], vote: float, best: float) -> None:
    right = Answered.of(row(drafts, ["070506"], "070506"), "070506", "aft", seed=1).right
    assert (right["vote"], right["best"]) == (vote, best)


def study(aft_by_seed: list[float], num: int = 40) -> Study:
    """SFT right half of the time everywhere; AFT's L=1 right in the given shares, by seed."""
    answered = []
    for seed, share in enumerate(aft_by_seed):
        for number in range(num):
            sft = dict.fromkeys(WAYS, float(number % 2))
            aft = {**sft, "L=1": float(number < share * num)}
            ids = {"seed": seed, "prompt_id": f"p-{number}"}
            answered += [Answered(system="sft", right=sft, **ids), Answered(system="aft", right=aft, **ids)]
    scores = [
        TargetScore(condition=name, prompt_id=f"p-{line}", nats=nats, num_tokens=2)
        for name, nats in (("base, prompt only", 2.0), ("base, prompt + proposals", 1.0))
        for line in range(2)
    ]
    return study_of(answered, dict.fromkeys(range(len(aft_by_seed)), scores), [True, False], num_resamples=200)


@pytest.mark.parametrize(
    ("aft_by_seed", "verdict"),
    [([0.9, 0.95], "higher"), ([0.1, 0.05], "lower"), ([0.5, 0.5], "no difference shown"), ([1.0, 0.4], None)],
)
def test_a_difference_is_called_where_the_interval_and_every_seed_agree(
    aft_by_seed: list[float], verdict: str | None
) -> None:
    difference = study(aft_by_seed).difference(("aft", "L=1"), ("sft", "single"))
    assert difference.pooled.num == 80
    assert difference.pooled.mean == pytest.approx(sum(aft_by_seed) / 2 - 0.5)
    assert difference.verdict == (verdict or "no difference shown")


def test_the_page_holds_the_numbers_and_loads_nothing(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "miniature" / "method.yaml")
    write_page(study([0.9, 0.95]), Folder.at(tmp_path), config, commit="0123456789abcdef", minutes=12.5)
    page = (tmp_path / PAGE).read_text()
    assert page.count("<svg") == 3
    assert "Does AFT + aggregation beat SFT alone?" in page
    assert "+0.425" in page
    assert "12 min 30 s" in page
    assert not re.search(r"(src|href)=.https?:", page)
    results = json.loads((tmp_path / "results.json").read_text())
    verdicts = {one["question"]["text"]: one["verdict"] for one in results["differences"]}
    assert verdicts["Does AFT + aggregation beat SFT alone?"] == "higher"


def test_only_questions_about_models_that_were_run_are_answered() -> None:
    asked = {side[0] for one in study([0.9]).differences for side in (one.question.first, one.question.second)}
    assert asked == {"sft", "aft"}


def test_perplexities_are_compared_with_the_first_condition() -> None:
    alone, shown = study([0.5, 0.5]).surprises
    assert (alone.nats_per_token.mean, shown.nats_per_token.mean) == (1.0, 0.5)
    assert (shown.difference.mean, shown.nats_per_token.num) == (-0.5, 4)
