"""targets -> evaluation/perplexity/<model>: how likely each held-out target is, with and without its proposals.

in    the last stage of targets
out   prompt_id, scores: list of {condition, nats, num_tokens, error}
on    CPU (a tokenizer); the engine of the endpoint that has just answered computes the log-probabilities

Targets that are not trained on are left out here too, so that the perplexities are those of what the variants learn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from aft_ray.config import PlacementConfig, TemplatesConfig
from aft_ray.engines.base import Engine
from aft_ray.evaluation.held_out import NOT_HELD_OUT
from aft_ray.evaluation.perplexity import TargetScore, score_target
from aft_ray.records import HELD_OUT
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.storage import Folder
from aft_ray.templates import AggregatorTemplate, fit_aggregation
from aft_ray.templates.loading import load_format

SCORE = pa.struct(
    [("condition", pa.string()), ("nats", pa.float64()), ("num_tokens", pa.int64()), ("error", pa.string())]
)
PERPLEXITIES = pa.schema([("prompt_id", pa.string()), ("scores", pa.list_(SCORE))])
NO_TARGET = "empty target"
MAX_CONCURRENCY = 32
"""Number of targets that a worker has scored at the same time."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A model, and what it sees before the target."""

    name: str
    adapter: str | None
    """Folder of a LoRA adapter, or None for the endpoint's own model."""
    shows_proposals: bool


class PerplexityWorker(RowWorker):
    """Scores the target of a row under every condition."""

    def __init__(
        self,
        engine: Callable[[], Awaitable[Engine]],
        conditions: Sequence[Condition],
        templates: TemplatesConfig,
        max_length: int,
    ) -> None:
        self.connect, self.conditions, self.templates, self.max_length = engine, conditions, templates, max_length
        self.template = AggregatorTemplate.load(templates.aggregator)
        self.engine: Engine | None = None
        self.connecting = asyncio.Lock()
        self.places = asyncio.Semaphore(MAX_CONCURRENCY)

    async def process(self, row: dict[str, Any]) -> Processed:
        if reason := _why_left_out(row):
            return Processed(rows=[], filtered=reason)
        engine = await self._connected()
        target_ids = self.format.target_ids(row["messages"], row["target"]["text"])
        proposals = [row["proposals"][index]["text"] for index in row["selected"]]
        room = self.max_length - len(target_ids)
        fitted = fit_aggregation(
            self.format, self.template, row["messages"], proposals, room, self.templates.length_policy
        )
        alone = self.format.prompt_ids(row["messages"])
        scores = []
        for condition in self.conditions:
            prompt_ids = fitted.prompt_ids if condition.shows_proposals else alone
            async with self.places:
                nats, error = await score_target(engine, prompt_ids, target_ids, condition.adapter)
            scores.append({"condition": condition.name, "nats": nats, "num_tokens": len(target_ids), "error": error})
        return Processed(rows=[{"prompt_id": row["prompt_id"], "scores": scores}])

    async def _connected(self) -> Engine:
        async with self.connecting:
            if self.engine is None:
                engine = await self.connect()
                self.format = await asyncio.to_thread(load_format, engine.info)
                self.engine = engine
        return self.engine

    async def check(self) -> None:
        if self.engine is not None:
            await self.engine.check()


def _why_left_out(row: Mapping[str, Any]) -> str | None:
    if row["split"] != HELD_OUT:
        return NOT_HELD_OUT
    if not row["target"]["text"].strip():
        return NO_TARGET
    return row["target_filter"]


def stage(
    run: Run,
    *,
    source: str,
    model: str,
    conditions: Sequence[Condition],
    scored_by: Mapping[str, Any],
    engine: Callable[[], Awaitable[Engine]],
) -> Stage:
    """Return the stage that scores the targets of stage `source` with one served model.

    `scored_by` identifies weights, engine and templates.
    """
    config = run.config
    return Stage(
        name=f"perplexity {model}",
        source=run.folder.child(source),
        output=_perplexity(run).child(model),
        schema=PERPLEXITIES,
        settings={
            "conditions": [condition.name for condition in conditions],
            "scored_by": scored_by,
            "max_length": config.training_set.max_length,
        },
        worker=partial(PerplexityWorker, engine, conditions, config.templates, config.training_set.max_length),
        placement=PlacementConfig(num_cpus=0.1),
        is_light=True,
    )


def _perplexity(run: Run) -> Folder:
    return run.folder.child("evaluation").child("perplexity")


def read_scores(run: Run, models: Sequence[str]) -> list[TargetScore]:
    """Return the scores that the stages of `models` hold."""
    folders = [_perplexity(run).child(model) for model in models]
    return [
        TargetScore(prompt_id=row["prompt_id"], **score)
        for folder in folders
        for row in folder.rows()
        for score in row["scores"]
    ]
