"""proposals -> scores: every proposal gets a reward, or None and the reason.

in    + proposals
out   score and score_error inside each proposal; scorer
on    CPU; a GPU for scorers that load a model: `reward_model`, `likelihood`, a local `judge`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from aft_ray.config import Config
from aft_ray.data.scorers import build_scorer, scorer_settings
from aft_ray.data.scoring import Score
from aft_ray.records import SCORES
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage


def with_scores(proposals: Sequence[dict[str, Any]], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return the proposals with their scores. A failed or empty proposal never keeps a score."""
    scored = []
    for proposal, score in zip(proposals, scores, strict=True):
        if proposal["error"] or not proposal["text"]:
            score = Score(value=None, reason=proposal["error"] or "empty answer")
        scored.append({**proposal, "score": score.value, "score_error": score.reason})
    return scored


class ScoreWorker(RowWorker):
    """Scores the proposals of a row."""

    def __init__(self, config: Config) -> None:
        self.scorer = build_scorer(
            config.scores, config.engine, seed=config.run.seed, in_context=config.templates.in_context
        )

    async def process(self, row: dict[str, Any]) -> Processed:
        # The scorer sees an empty text in place of a failed proposal, and gives it no score.
        texts = ["" if proposal["error"] else proposal["text"] for proposal in row["proposals"]]
        scored = await self.scorer.score(row, texts)
        proposals = with_scores(row["proposals"], scored.scores)
        return Processed(
            rows=[{**row, "proposals": proposals, "scorer": self.scorer.name_of(row)}],
            prompt_tokens=scored.prompt_tokens,
            completion_tokens=scored.completion_tokens,
            cost_usd=scored.cost_usd,
        )

    async def check(self) -> None:
        await self.scorer.check()


def stage(run: Run) -> Stage:
    """Return the scores stage of a run."""
    return Stage(
        name="scores",
        source=run.folder.child("proposals"),
        output=run.folder.child("scores"),
        schema=SCORES,
        settings=scorer_settings(run.config),
        worker=partial(ScoreWorker, run.config),
        placement=run.config.scores.placement,
    )
