"""proposals -> scores: a reward for every proposal, or None with the reason.

in    + proposals
out   score and score_error inside each proposal; scorer
on    CPU; a GPU for scorers with a model of their own: `reward_model`, `likelihood`, a local `judge`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from aft_ray.config import Config
from aft_ray.data.scorers import Score, build_scorer
from aft_ray.records import SCORES
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.templates import InContextPrompt


def with_scores(proposals: Sequence[dict[str, Any]], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The proposals with their scores; a failed or empty proposal is never scored, whatever the scorer said."""
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
        # What failed is shown to no scorer: an empty text stands in its place and gets no score.
        texts = ["" if proposal["error"] else proposal["text"] for proposal in row["proposals"]]
        scores = await self.scorer.score(row, texts)
        proposals = with_scores(row["proposals"], scores)
        return Processed(
            rows=[{**row, "proposals": proposals, "scorer": self.scorer.name_of(row)}],
            prompt_tokens=scores.prompt_tokens,
            completion_tokens=scores.completion_tokens,
            cost_usd=scores.cost_usd,
        )

    async def check(self) -> None:
        await self.scorer.check()


def scorer_settings(config: Config) -> dict[str, Any]:
    """What decides the scores beyond `scores` itself: the run's seed and model, where the scorer uses them."""
    without_engines: Any = {"placement": True, "judge": {"engine"}, "likelihood": {"engine"}}
    settings: dict[str, Any] = {"scores": config.scores.model_dump(mode="json", exclude=without_engines)}
    if config.scores.scorer == "judge" and config.scores.judge is not None:
        from aft_ray.data.judge import PROMPT_HASH

        settings |= {"seed": config.run.seed, "judge_prompt": PROMPT_HASH}
        settings["engine"] = config.scores.judge.engine.identity()
    if config.scores.scorer == "likelihood":
        settings["engine"] = (config.scores.likelihood.engine or config.engine).identity()
        settings["in_context"] = InContextPrompt.load(config.templates.in_context).hash
    return settings


def stage(run: Run) -> Stage:
    """The scores stage of a run."""
    return Stage(
        name="scores",
        source=run.folder.child("proposals"),
        output=run.folder.child("scores"),
        schema=SCORES,
        settings=scorer_settings(run.config),
        worker=partial(ScoreWorker, run.config),
        placement=run.config.scores.placement,
    )
