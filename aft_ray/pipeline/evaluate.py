"""Evaluation of a run: its endpoint is asked the held-out prompts, and its targets are scored for perplexity."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aft_ray.config import ServingConfig, SystemConfig, TemplatesConfig
from aft_ray.evaluation import stage as answers
from aft_ray.evaluation.perplexity import ScoredCondition, ScoredRow, TargetScore, score_targets
from aft_ray.pipeline.cluster import RaySession
from aft_ray.progress import Progress
from aft_ray.records import HELD_OUT, fingerprint
from aft_ray.runs import Run
from aft_ray.stages import run_stage

PERPLEXITY = "perplexity.json"


def evaluate(run: Run, session: RaySession) -> None:
    """Collect the answers of every system, then the perplexities; finished parts are skipped.

    Adapters are served beside the base model; a fully trained model has an endpoint of its own, one after the other.
    Perplexities need log-probabilities, which no HTTP endpoint returns: the engine behind the run's own endpoint
    computes them, and they are left out where `evaluation.base_url` names another endpoint.
    """
    missing = [system for system in systems_of(run) if not _answered(run, system)]
    served_here = run.config.evaluation.base_url is None
    unscored = served_here and not run.folder.child("evaluation").exists(PERPLEXITY)
    if not missing and not unscored:
        return
    session.connect()
    whole = models_of(run) if served_here else {}
    scores: list[TargetScore] = []
    for served in (None, *whole):
        asked = [
            system for system in missing if (_model_name(system) if _model_name(system) in whole else None) == served
        ]
        if not asked and not unscored:
            continue
        with endpoint(run, served) as base_url:
            for system in asked:
                _answer(run, system, base_url)
            if unscored:
                scores += asyncio.run(_scores(run, served))
    if unscored:
        content = json.dumps([dataclasses.asdict(score) for score in scores], indent=1)
        run.folder.child("evaluation").write_bytes(PERPLEXITY, content.encode())


def _model_name(system: SystemConfig) -> str:
    return system.model.partition("@")[0]


def adapters_of(run: Run) -> dict[str, str]:
    """Return the run's trained adapters by variant, as absolute paths."""
    folder = Path(run.folder.path) / "model"
    return {
        variant: str(folder / variant)
        for variant in run.config.training_set.variants
        if (folder / variant / "adapter_config.json").is_file()
    }


def models_of(run: Run) -> dict[str, str]:
    """Return the run's fully trained models by variant, as absolute paths."""
    folder = Path(run.folder.path) / "model"
    if run.config.training.method != "full":
        return {}
    return {
        variant: str(folder / variant)
        for variant in run.config.training_set.variants
        if (folder / variant / "config.json").is_file()
    }


def serving_of(run: Run, whole: str | None = None) -> ServingConfig:
    """Return the run's serving section, with the run's own engine, adapters and templates where it names none.

    `whole`: instead of the base model, serve this variant's fully trained model.
    """
    serving = run.config.serving
    adapters = serving.adapters if serving.adapters is not None else adapters_of(run)
    engine: Any = serving.engine or run.config.engine
    base_name = serving.base_name
    if whole is not None:
        engine, adapters, base_name = engine.model_copy(update={"model": models_of(run)[whole]}), {}, whole
    return serving.model_copy(
        update={
            "engine": engine,
            "adapters": adapters,
            "base_name": base_name,
            "default_model": serving.default_model or (list(adapters)[-1] if adapters else base_name),
            "templates": run.config.templates,
        }
    )


def systems_of(run: Run) -> tuple[SystemConfig, ...]:
    """Return the systems to evaluate: those named, else every model of the run with the evaluation's plan."""
    if run.config.evaluation.systems is not None:
        return run.config.evaluation.systems
    serving = serving_of(run)
    names = [serving.base_name, *(serving.adapters or {}), *models_of(run)]
    return tuple(SystemConfig(name=name, model=name) for name in names)


@contextlib.contextmanager
def endpoint(run: Run, whole: str | None = None) -> Iterator[str]:
    """Yield the URL of the endpoint to ask: the named one, else the run's own, which is served during the block."""
    if run.config.evaluation.base_url is not None:
        yield run.config.evaluation.base_url
        return
    from aft_ray.serving import serve_app, stop

    with Progress("serve", total=1, unit="endpoint") as progress:
        base_url = serve_app(serving_of(run, whole).model_copy(update={"port": 0}))
        progress.update(done=1, note=base_url)
    try:
        yield base_url
    finally:
        stop()


def _answered(run: Run, system: SystemConfig) -> bool:
    manifest = run.manifest(f"evaluation/{system.name}/answers")
    return manifest is not None and manifest.status == "done"


def _answer(run: Run, system: SystemConfig, base_url: str) -> None:
    config = run.config.evaluation
    run_stage(
        answers.stage(
            run,
            base_url=base_url,
            system=system.name,
            model=system.model,
            model_fingerprint=_weights_of(run, system.model),
            plan=system.plan or config.plan,
            max_concurrency=config.max_concurrency,
        ),
        max_failure_rate=run.config.run.max_failure_rate,
    )


def _weights_of(run: Run, model: str) -> str:
    """Return a fingerprint of a model's weights: of its training summary, or of the base model's settings."""
    name = model.partition("@")[0]
    adapter = (serving_of(run).adapters or {}).get(name, models_of(run).get(name))
    if adapter is None:
        return fingerprint(run.config.engine.model_dump(mode="json"))
    summary = Path(adapter, "summary.json")
    return fingerprint(summary.read_text() if summary.is_file() else adapter)


# ── perplexity ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _scores(run: Run, whole: str | None) -> list[TargetScore]:
    """Score the held-out targets after the prompt alone and after prompt + proposals, before and after training, on the
    engine that has just answered (paper, Figure 6).
    """
    from aft_ray.serving import served_engine
    from aft_ray.templates.loading import load_format

    config = run.config
    rows = [row for row in run.folder.child("targets").rows() if row["split"] == HELD_OUT and row["target"]["text"]]
    engine = await served_engine(serving_of(run, whole))
    prompt_format = load_format(engine.info.tokenizer, config.templates.in_context)
    trained: dict[str, str | None] = {whole: None} if whole else {**adapters_of(run)}
    conditions = conditions_of(
        prompt_format, config.templates, config.training_set.max_length, rows, trained, with_base=whole is None
    )
    with Progress("perplexity", total=len(rows) * len(conditions), unit="targets") as progress:
        return await score_targets(engine, conditions, on_progress=lambda done, _: progress.update(done=done))


def conditions_of(
    prompt_format: Any,
    templates: TemplatesConfig,
    max_length: int,
    rows: list[dict[str, Any]],
    trained: Mapping[str, str | None],
    with_base: bool = True,
) -> list[ScoredCondition]:
    """Return the conditions of Figure 6 that this engine can show; row i is the same target in each.

    `trained`: adapter by variant; None where the variant is the engine's own model, which then is no base model.
    """
    from aft_ray.data.selection import selected_texts
    from aft_ray.templates import AggregatorTemplate, fit_aggregation

    template = AggregatorTemplate.load(templates.aggregator)
    alone: list[ScoredRow] = []
    with_proposals: list[ScoredRow] = []
    for row in rows:
        target_ids = prompt_format.target_ids(row["messages"], row["target"]["text"])
        room = max_length - len(target_ids)
        fitted = fit_aggregation(
            prompt_format, template, row["messages"], selected_texts(row), room, templates.length_policy
        )
        alone.append((prompt_format.prompt_ids(row["messages"]), target_ids))
        with_proposals.append((fitted.prompt_ids, target_ids))
    conditions = []
    if with_base:
        conditions.append(ScoredCondition(name="base, prompt only", adapter=None, rows=alone))
        conditions.append(ScoredCondition(name="base, prompt + proposals", adapter=None, rows=with_proposals))
    if "sft" in trained:
        conditions.append(ScoredCondition(name="SFT, prompt only", adapter=trained["sft"], rows=alone))
    if "aft" in trained:
        conditions.append(ScoredCondition(name="AFT, prompt + proposals", adapter=trained["aft"], rows=with_proposals))
    return conditions
