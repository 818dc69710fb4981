"""proposals -> scores: a reward for every proposal, or None with the reason.

in    + proposals
out   score and score_error inside each proposal; scorer
on    CPU; a GPU for scorer `reward_model`
"""

from __future__ import annotations

from functools import partial
from typing import Any

from aft_ray.config import ScoresConfig
from aft_ray.data.scorers import Score, build_scorer
from aft_ray.records import SCORES
from aft_ray.runs import Run
from aft_ray.stages import Processed, RowWorker, Stage


def with_scores(proposals: list[dict[str, Any]], scores: list[Score]) -> list[dict[str, Any]]:
    """The proposals with their scores; a failed or empty proposal is never scored, whatever the scorer said."""
    scored = []
    for proposal, score in zip(proposals, scores, strict=True):
        if proposal["error"] or not proposal["text"]:
            score = Score(value=None, reason=proposal["error"] or "empty answer")
        scored.append({**proposal, "score": score.value, "score_error": score.reason})
    return scored


class ScoreWorker(RowWorker):
    """Scores the proposals of a row."""

    def __init__(self, config: ScoresConfig) -> None:
        self.config = config
        self.scorer = build_scorer(config)

    async def process(self, row: dict[str, Any]) -> Processed:
        scores = self.scorer.score(row, [proposal["text"] for proposal in row["proposals"]])
        proposals = with_scores(row["proposals"], scores)
        return Processed(rows=[{**row, "proposals": proposals, "scorer": self.scorer.name_of(row)}])


def stage(run: Run) -> Stage:
    """The scores stage of a run."""
    config = run.config.scores
    return Stage(
        name="scores",
        source=run.folder.child("proposals"),
        output=run.folder.child("scores"),
        schema=SCORES,
        settings={"scores": config.model_dump(mode="json", exclude={"placement"})},
        worker=partial(ScoreWorker, config),
        placement=config.placement,
    )
