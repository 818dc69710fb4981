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
from aft_ray.data.scorers import build_scorer, gpus_of_scorer, is_light, scorer_settings
from aft_ray.data.scoring import Score, Scored, Scorer
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


class ScoringWorker(RowWorker):
    """A worker that holds a scorer."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def processed(self, row: dict[str, Any], scored: Scored, unusable: str | None = None) -> Processed:
        """Return a row with what its scores cost. It is of no use where a scorer was asked and gave none."""
        reasons = [score.reason for score in scored.scores]
        if all(score.value is None for score in scored.scores) and self.scorer.name_of(row) != "none":
            unusable = unusable or f"no score: {next(filter(None, reasons), 'there was nothing to score')}"
        return Processed(rows=[row], unusable=unusable, **scored.counts)

    async def check(self) -> None:
        await self.scorer.check()

    async def close(self) -> None:
        await self.scorer.close()


class ScoreWorker(ScoringWorker):
    """Scores the proposals of a row."""

    def __init__(self, config: Config) -> None:
        in_context = config.templates.in_context
        super().__init__(build_scorer(config.scores, config.engine, seed=config.run.seed, in_context=in_context))

    async def process(self, row: dict[str, Any]) -> Processed:
        # The scorer sees an empty text in place of a failed proposal, and gives it no score.
        texts = ["" if proposal["error"] else proposal["text"] for proposal in row["proposals"]]
        scored = await self.scorer.score(row, texts)
        proposals = with_scores(row["proposals"], scored.scores)
        return self.processed({**row, "proposals": proposals, "scorer": self.scorer.name_of(row)}, scored)


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
        must_yield=True,
        gpus=gpus_of_scorer(run.config),
        is_light=is_light(run.config.scores),
    )
