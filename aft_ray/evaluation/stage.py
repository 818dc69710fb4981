"""prompts -> evaluation/<system>/answers: every held-out prompt asked of an endpoint, resumable like any other stage.

in    prompts with split `held_out`
out   ANSWERS: every draft, every layer, the answer, usage by layer, seconds
on    CPU; the models are behind the endpoint
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import httpx

from aft_ray.config import PlacementConfig
from aft_ray.errors import EngineError
from aft_ray.evaluation.ask import ANSWERS, answer_row, ask
from aft_ray.inference.plan import Plan
from aft_ray.records import HELD_OUT, derive_seed, to_row
from aft_ray.runs import Run
from aft_ray.shards import Processed, Stage

TIMEOUT_S = 600.0
NOT_HELD_OUT = "training prompt"
"""Why a stage of answers leaves a row out."""


class AnswerWorker:
    """Asks the endpoint for one system's answers."""

    def __init__(self, base_url: str, system: str, model: str, plan: Plan, seed: int, max_concurrency: int) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.system, self.model, self.plan, self.seed = system, model, plan, seed
        self.places = asyncio.Semaphore(max_concurrency)
        self.client = httpx.AsyncClient(timeout=TIMEOUT_S)

    async def process(self, row: dict[str, Any]) -> Processed:
        if row["split"] != HELD_OUT:
            return Processed(rows=[], filtered=NOT_HELD_OUT)
        seed = derive_seed(self.seed, row["prompt_id"], 0, 0)
        async with self.places:
            asked = await ask(self.client, self.base_url, self.model, row["messages"], self.plan, seed)
        return Processed(
            rows=[answer_row(self.system, row, asked)],
            prompt_tokens=sum(layer.prompt_tokens for layer in asked.usage),
            completion_tokens=sum(layer.completion_tokens for layer in asked.usage),
        )

    async def check(self) -> None:
        """Raise EngineError when the endpoint is gone, so that no row is blamed for it."""
        try:
            response = await self.client.get(f"{self.base_url}/health")
        except httpx.HTTPError as error:
            raise EngineError(f"the endpoint {self.base_url} does not answer: {error!r}") from error
        if response.status_code != httpx.codes.OK:
            raise EngineError(f"the endpoint {self.base_url} is not healthy: status {response.status_code}")


def stage(
    run: Run, *, base_url: str, system: str, model: str, model_fingerprint: str, plan: Plan, max_concurrency: int
) -> Stage:
    """Return the stage that collects one system's answers. `model_fingerprint` identifies the weights that answer."""
    return Stage(
        name=f"answers {system}",
        source=run.folder.child("prompts"),
        output=run.folder.child("evaluation").child(system).child("answers"),
        schema=ANSWERS,
        settings={
            "system": system,
            "model": model,
            "model_fingerprint": model_fingerprint,
            "plan": to_row(plan),
            "seed": run.config.run.seed,
        },
        worker=partial(AnswerWorker, base_url, system, model, plan, run.config.run.seed, max_concurrency),
        placement=PlacementConfig(num_cpus=0.1, max_shards_in_flight=max_concurrency),
    )
