"""evaluation/held_out -> evaluation/<system>/answers: every held-out prompt, asked of an endpoint.

in    the held-out prompts
out   ANSWERS: every draft, every layer, the answer, usage by layer, seconds
on    CPU; the models are behind the endpoint
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import httpx

from aft_ray.config import PlacementConfig
from aft_ray.engines.adaptive_limit import AdaptiveLimit
from aft_ray.errors import ConfigError, EngineError
from aft_ray.evaluation.ask import ANSWERS, answer_row, ask
from aft_ray.evaluation.held_out import held_out
from aft_ray.inference.plan import Plan
from aft_ray.records import derive_seed, to_row
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage

TIMEOUT_S = 600.0


def http_client(transport: Callable[[], httpx.AsyncBaseTransport] | None, api_key_env: str | None) -> httpx.AsyncClient:
    """Return a client of the endpoint. `api_key_env` names the variable, in this process, that holds its key."""
    headers = {}
    if api_key_env is not None:
        if not os.environ.get(api_key_env):
            raise ConfigError(
                f"evaluation.api_key_env: the environment variable {api_key_env} is not set where the answers are "
                "asked for; set it on every node"
            )
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
    return httpx.AsyncClient(timeout=TIMEOUT_S, headers=headers, transport=transport() if transport else None)


class AnswerWorker(RowWorker):
    """Asks the endpoint for one system's answers."""

    def __init__(
        self,
        client: Callable[[], httpx.AsyncClient],
        base_url: str,
        system: str,
        model: str,
        plan: Plan,
        seed: int,
        max_concurrency: int,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.system, self.model, self.plan, self.seed = system, model, plan, seed
        self.limit = AdaptiveLimit(max_concurrency)
        self.client = client()

    async def process(self, row: dict[str, Any]) -> Processed:
        seed = derive_seed(self.seed, row["prompt_id"], 0, 0)
        asked = await ask(self.client, self.base_url, self.model, row["messages"], self.plan, seed, self.limit)
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

    async def close(self) -> None:
        await self.client.aclose()


def stage(
    run: Run,
    *,
    system: str,
    model: str,
    plan: Plan,
    answered_by: Mapping[str, Any],
    base_url: str,
    client: Callable[[], httpx.AsyncClient],
) -> Stage:
    """Return the stage that collects one system's answers.

    `answered_by` identifies what answers: weights, engine and templates, or the URL of somebody else's endpoint.
    """
    max_concurrency = run.config.evaluation.max_concurrency
    return Stage(
        name=f"answers {system}",
        source=held_out(run),
        output=run.folder.child("evaluation").child(system).child("answers"),
        schema=ANSWERS,
        settings={
            "system": system,
            "model": model,
            "answered_by": answered_by,
            "plan": to_row(plan),
            "seed": run.config.run.seed,
        },
        worker=partial(AnswerWorker, client, base_url, system, model, plan, run.config.run.seed, max_concurrency),
        placement=PlacementConfig(num_cpus=0.1, max_shards_in_flight=max_concurrency),
        is_light=True,
    )
