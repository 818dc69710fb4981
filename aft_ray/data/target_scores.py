"""targets -> target_scores: scores the teacher's candidates, and chooses the target with these scores.

in    + candidates
out   the same columns; score inside each candidate and inside the target; target, accepted_targets and target_filter
      as the scores decide
on    as the stage `scores`: CPU, or a GPU for a reward model or a local judge

The stage runs only where a choice between candidates or a filter needs scores (`Config.scores_targets`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from aft_ray.config import Config
from aft_ray.data.scorers import build_scorer, candidate_scorer_config, gpus_of_scorer, is_light, scorer_settings
from aft_ray.data.scores import ScoringWorker
from aft_ray.data.targets import chosen, why_unusable
from aft_ray.records import TARGETS, Target, to_row
from aft_ray.runs import Run
from aft_ray.shards import Processed, Stage


class TargetScoreWorker(ScoringWorker):
    """Scores the candidates of a row and chooses again."""

    def __init__(self, config: Config) -> None:
        self.config = config.targets
        scores = candidate_scorer_config(config.scores)
        super().__init__(build_scorer(scores, config.engine, seed=config.run.seed))

    async def process(self, row: dict[str, Any]) -> Processed:
        candidates = [Target(**candidate) for candidate in row["candidates"]]
        scored = await self.scorer.score(row, [candidate.text for candidate in candidates])
        candidates = [
            dataclasses.replace(candidate, score=score.value if candidate.text else None)
            for candidate, score in zip(candidates, scored.scores, strict=True)
        ]
        made = {
            **row,
            **chosen(row, candidates, self.config),
            "candidates": [to_row(candidate) for candidate in candidates],
        }
        return self.processed(made, scored, unusable=why_unusable(made))


def stage(run: Run) -> Stage:
    """Return the stage that scores the targets of a run."""
    config = run.config
    scores = candidate_scorer_config(config.scores)
    return Stage(
        name="target_scores",
        source=run.folder.child("targets"),
        output=run.folder.child("target_scores"),
        schema=TARGETS,
        settings=scorer_settings(config.model_copy(update={"scores": scores})),
        worker=partial(TargetScoreWorker, config),
        placement=config.scores.placement,
        must_yield=True,
        gpus=gpus_of_scorer(config.model_copy(update={"scores": scores})),
        is_light=is_light(scores),
    )
