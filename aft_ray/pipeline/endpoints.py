"""Asks every endpoint of the steps that are about to run for one token, before anything is paid for.

    proposals.engine, scores.judge.engine, targets.engine    one call each, with the step's own sampling
    evaluation.base_url                                       its list of models

A missing key, a wrong URL, an unknown model and a field that the server refuses are found here, and not after the
steps before it. The endpoint of a step that is done is not asked.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from aft_ray.config import Config, OpenAIEngineConfig
from aft_ray.config.conditions import served_names
from aft_ray.data.proposals import parts
from aft_ray.engines import GenerateRequest, Sample, Sampling
from aft_ray.engines.endpoint_reply import reason_of
from aft_ray.engines.openai import OpenAIEngine
from aft_ray.errors import ConfigError
from aft_ray.evaluation.answers import http_client
from aft_ray.pipeline.environment import check_names
from aft_ray.records import Message
from aft_ray.runs import read_manifest
from aft_ray.storage import Folder

QUESTION = Message(role="user", content="Answer with one word: yes.")
ONE_TOKEN_IS_TOO_FEW = "output limit was reached"
"""What OpenAI says of a reasoning model that may write one token: the endpoint is there and takes the request."""
TIMEOUT_S = 60.0
"""Seconds for the list of models of an endpoint to evaluate."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An endpoint that a step will ask."""

    key: str
    step: str
    folder: str
    """Folder of the stage that asks it."""
    engine: OpenAIEngineConfig
    sampling: Sampling


def check_endpoints(config: Config, steps: Sequence[str], retry_failed: bool = False) -> None:
    """Ask the endpoints of the named steps that are not done. Raises ConfigError with one line per problem."""
    run = Folder.at(config.run.dir)
    asked = [one for one in endpoints(config) if one.step in steps and not _is_done(run, one.folder, retry_failed)]
    keys = {one.engine.api_key_env for one in asked if one.engine.api_key_env is not None}
    check_names(sorted(keys), config.run.environment_file)
    problems = list(asyncio.run(_ask_all(asked))) if asked else []
    if config.evaluation.base_url is not None and "evaluate" in steps:
        problems += list(_problems_of_evaluated(config, config.evaluation.base_url))
    if problems:
        raise ConfigError("\n".join(problems))


def endpoints(config: Config) -> Iterator[Asked]:
    """Yield every endpoint of the data stages, with the stage that asks it."""
    if not config.makes_targets:
        return
    for part in parts(config.proposals):
        engine = part.proposer.engine or config.engine
        if part.proposer.source == "on_policy" and engine.type == "openai":
            several = f"proposals.proposers.{part.index}" if config.proposals.proposers else "proposals"
            sampling = part.proposer.sampling or config.proposals.sampling
            yield Asked(
                key=f"{several}.engine", step="proposals", folder=part.stage_name, engine=engine, sampling=sampling
            )
    judge = config.scores.judge
    if config.scores.scorer == "judge" and judge is not None and judge.engine.type == "openai":
        for step in ("scores", "target_scores") if config.scores_targets else ("scores",):
            yield Asked(key="scores.judge.engine", step=step, folder=step, engine=judge.engine, sampling=judge.sampling)
    teacher = config.targets.engine or config.engine
    if config.targets.source == "teacher" and teacher.type == "openai":
        yield Asked(
            key="targets.engine", step="targets", folder="targets", engine=teacher, sampling=config.targets.sampling
        )


def _is_done(run: Folder, stage: str, retry_failed: bool) -> bool:
    manifest = read_manifest(run.child(stage))
    return manifest is not None and manifest.status == "done" and not (retry_failed and manifest.num_failed)


async def _ask_all(asked: Sequence[Asked]) -> Iterator[str]:
    different = {(one.key, one.engine.model_dump_json()): one for one in asked}.values()
    return filter(None, await asyncio.gather(*map(_problem_of, different)))


async def _problem_of(asked: Asked) -> str:
    """Return what is wrong with an endpoint, or nothing."""
    engine = OpenAIEngine(asked.engine.model_copy(update={"max_retries": min(1, asked.engine.max_retries)}))
    request = GenerateRequest(
        request_id="check",
        prompt_ids=(),
        messages=(QUESTION,),
        sampling=dataclasses.replace(asked.sampling, max_tokens=1),
        seeds=(0,),
    )
    try:
        samples = [event async for event in engine.generate(request) if isinstance(event, Sample)]
    finally:
        await engine.close()
    error = samples[0].error
    if error is None or ONE_TOKEN_IS_TOO_FEW in error:
        return ""
    return f"{asked.key}: {asked.engine.base_url} does not answer as model {asked.engine.model}: {error}"


def _problems_of_evaluated(config: Config, base_url: str) -> Iterator[str]:
    """Yield what is wrong with the endpoint to evaluate."""

    async def models() -> httpx.Response:
        async with http_client(None, config.evaluation.api_key_env) as client:
            return await client.get(f"{base_url.rstrip('/').removesuffix('/v1')}/v1/models", timeout=TIMEOUT_S)

    try:
        response = asyncio.run(models())
    except httpx.HTTPError as error:
        yield f"evaluation.base_url {base_url}: no answer: {type(error).__name__}: {error}"
        return
    if response.status_code != httpx.codes.OK:
        yield f"evaluation.base_url {base_url}: status {response.status_code}: {reason_of(response.text)}"
        return
    served = {str(model.get("id")) for model in response.json().get("data", [])}
    systems = config.evaluation.systems
    for name in [system.model for system in systems] if systems else served_names(config):
        if name.partition("@")[0] not in served:
            yield f"evaluation.base_url {base_url} serves {', '.join(sorted(served))}, and '{name}' is to be evaluated"
