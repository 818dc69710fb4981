"""Evaluation of a run: every system answers the held-out prompts, the answers are scored, and the targets as well.

    prompts -> evaluation/held_out -> evaluation/<system>/answers -> evaluation/<system>/scores
    targets -> evaluation/perplexity/<model>

With `evaluation.prompts`, those prompts are read into evaluation/prompts and asked in place of the held-out ones.

Each arrow is a stage like those of the data: it is resumed, tried again for failed rows, and refused when what it was
made from has changed. The answers come from the run's own application, which is served for as long as a stage needs it
and reached over Serve's handles, so that it does not matter on which node a worker runs and where HTTP listens; or from
the endpoint that `evaluation.base_url` names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any

from aft_ray.config import AdmissionConfig, PlacementConfig, ServingConfig, SystemConfig
from aft_ray.data.prompts.stage import make_evaluation_prompts
from aft_ray.data.proposals import aggregator_hash
from aft_ray.data.scorers import answer_scorer_config, build_scorer, gpus_of_scorer, is_light, scorer_settings
from aft_ray.data.targets import last_stage
from aft_ray.errors import ConfigError
from aft_ray.evaluation import answers, held_out, perplexity_stage, scores
from aft_ray.evaluation.perplexity_stage import Condition
from aft_ray.models import engine_identity, identity
from aft_ray.pipeline.cluster import RaySession
from aft_ray.pipeline.running import run_in, say
from aft_ray.progress import Progress
from aft_ray.records import fingerprint
from aft_ray.runs import Run
from aft_ray.serving.errors import HttpError
from aft_ray.serving.http.inside import ServeTransport
from aft_ray.serving.openai.request import plan_of, read_alias
from aft_ray.shards import Stage

SINGLE = "-single"
"""Suffix of a system that answers without aggregation (`evaluation.single`)."""


def evaluate(run: Run, session: RaySession) -> None:
    """Collect the answers of every system and the perplexities of the targets, then score the answers.

    Adapters are served beside the base model; a fully trained model has an application of its own, one after the other.
    Perplexities need log-probabilities, which no HTTP endpoint returns: the engine behind the run's own application
    computes them, and they are left out where `evaluation.base_url` names another endpoint.
    """
    systems = systems_of(run)
    if run.config.evaluation.prompts is not None:
        say(make_evaluation_prompts(run, run.config.evaluation.prompts))
    run_in(run, held_out.stage(run), session.connect)
    with Application(run, session) as application:
        for model in served_models(run):
            serve = partial(application.serve, model)
            for system in systems:
                if _served_by(run, system) == model:
                    run_in(run, answers_stage(run, system), serve)
            if model in scored_models(run):
                run_in(run, targets_stage(run, model), serve)
    for system in systems:
        run_in(run, scores_stage(run, system), session.connect)


# ── what is evaluated ────────────────────────────────────────────────────────────────────────────────────────────────


def adapters_of(run: Run) -> dict[str, str]:
    """Return the run's trained adapters by variant, as absolute paths or URLs."""
    return _trained(run, "adapter_config.json")


def models_of(run: Run) -> dict[str, str]:
    """Return the run's fully trained models by variant, as absolute paths or URLs."""
    return _trained(run, "config.json") if run.config.training.method == "full" else {}


def _trained(run: Run, file: str) -> dict[str, str]:
    folders = {variant: run.folder.child("model").child(variant) for variant in run.config.training_set.variants}
    return {variant: folder.location for variant, folder in folders.items() if folder.exists(file)}


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
    """Return the systems to evaluate, each with its plan: those named, else every model of the run,
    and each alone if that is wanted.

    A suffix of the model's name, as in `aft@k3-l2`, has gone into the plan.
    """
    config = run.config.evaluation
    named = config.systems
    if named is None:
        serving = serving_of(run)
        names = [serving.base_name, *(serving.adapters or {}), *models_of(run)]
        named = tuple(SystemConfig(name=name, model=name) for name in names)
        if config.single:
            once = dataclasses.replace(config.plan, num_layers=0, proposal=config.plan.final)
            named += tuple(SystemConfig(name=f"{name}{SINGLE}", model=name, plan=once) for name in names)
    return tuple(_with_plan(run, system) for system in named)


def _with_plan(run: Run, system: SystemConfig) -> SystemConfig:
    model, changes = read_alias(system.model)
    plan = system.plan or run.config.evaluation.plan
    try:
        plan = plan_of(changes, plan) if changes else plan
    except HttpError as error:
        raise ConfigError(f"evaluation.systems: {system.name}: model {system.model}: {error}") from None
    return system.model_copy(update={"model": model, "plan": plan})


def served_models(run: Run) -> list[str | None]:
    """Return the models that are served one after the other: the base model with its adapters, then each fully trained
    model. None stands for an endpoint of somebody else.
    """
    if run.config.evaluation.base_url is not None:
        return [None]
    return [run.config.serving.base_name, *models_of(run)]


def _served_by(run: Run, system: SystemConfig) -> str | None:
    served = served_models(run)
    return system.model if system.model in served else served[0]


def _serving(run: Run, model: str) -> ServingConfig:
    return serving_of(run, model if model in models_of(run) else None)


# ── the run's own application ────────────────────────────────────────────────────────────────────────────────────────


def app_name(run: Run) -> str:
    """Return the name of the run's applications on a cluster: readable, and the run's own."""
    slug = re.sub("[^A-Za-z0-9]+", "-", run.folder.name).strip("-")[:40]
    return f"aft-{slug}-{fingerprint(run.folder.location)[:8]}"


class Application:
    """The application that answers, served from the first stage that needs it to the end of the block.

    Only callers within the cluster reach it, so it needs neither keys nor limits, and an application of somebody else
    on the same cluster is left alone.
    """

    def __init__(self, run: Run, session: RaySession) -> None:
        self.run, self.session = run, session
        self.name = evaluation_app(run)
        self.serving: str | None = None

    def serve(self, model: str | None) -> None:
        """Serve one of `served_models`, in place of the one that is served now."""
        from aft_ray.serving import serve_app

        self.session.connect()
        if model is None or model == self.serving:
            return
        self.stop()
        closed: dict[str, Any] = {
            "route_prefix": None,
            "api_keys_env": None,
            "keys_file": None,
            "adapters_dir": None,
            "ledger": None,
            "admission": AdmissionConfig(max_requests=None),
        }
        with Progress("serve", total=1, unit="application") as progress:
            self.serving = model
            serve_app(_serving(self.run, model).model_copy(update=closed), name=self.name, replace_abandoned=True)
            progress.update(done=1, note=model)

    def stop(self) -> None:
        from aft_ray.serving import stop

        if self.serving is not None:
            stop(self.name)
            self.serving = None

    def __enter__(self) -> Application:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def evaluation_app(run: Run) -> str:
    """Return the name of the application that an evaluation starts."""
    return f"{app_name(run)}-evaluation"


# ── the stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def answers_stage(run: Run, system: SystemConfig) -> Stage:
    """Return the stage that collects one system's answers."""
    config = run.config.evaluation
    assert system.plan is not None
    transport: Callable[[], ServeTransport] | None = None
    base_url, answered_by = config.base_url, {"base_url": config.base_url}
    if base_url is None:
        name = evaluation_app(run)
        base_url, transport = f"http://{name}", partial(ServeTransport, name)
        answered_by = _identity(run, _served_by(run, system), [system.model])
    return answers.stage(
        run,
        system=system.name,
        model=system.model,
        plan=system.plan,
        answered_by=answered_by,
        base_url=base_url,
        client=partial(answers.http_client, transport, config.api_key_env if config.base_url else None),
    )


def scores_stage(run: Run, system: SystemConfig) -> Stage:
    """Return the stage that scores one system's answers."""
    own = run.config.scores
    config = run.config.model_copy(update={"scores": answer_scorer_config(own)})
    return scores.stage(
        run,
        system=system.name,
        scorer=partial(build_scorer, config.scores, config.engine, seed=config.run.seed),
        settings=scorer_settings(config),
        placement=own.placement if config.scores == own else PlacementConfig(),
        gpus=gpus_of_scorer(config),
        is_light=is_light(config.scores),
    )


def targets_stage(run: Run, model: str) -> Stage:
    """Return the stage that scores the held-out targets with one of `scored_models`, after the prompt alone and after
    prompt + proposals (paper, Figure 6).
    """
    from aft_ray.serving import served_engine

    conditions = _conditions(run, model)
    return perplexity_stage.stage(
        run,
        source=last_stage(run.config),
        model=model,
        conditions=conditions,
        scored_by={
            **_identity(run, model, adapters_of(run) if model not in models_of(run) else ()),
            "length_policy": run.config.templates.length_policy,
        },
        engine=partial(served_engine, evaluation_app(run)),
    )


def scored_models(run: Run) -> list[str]:
    """Return the served models that score the targets: those that show one of the paper's conditions."""
    return [model for model in served_models(run) if model is not None and _conditions(run, model)]


def _conditions(run: Run, model: str) -> list[Condition]:
    trained: dict[str, str | None] = {model: None} if model in models_of(run) else {**adapters_of(run)}
    conditions: list[Condition] = []
    if not run.config.makes_targets:
        return conditions
    if model == run.config.serving.base_name:
        conditions.append(Condition(name="base, prompt only", adapter=None, shows_proposals=False))
        conditions.append(Condition(name="base, prompt + proposals", adapter=None, shows_proposals=True))
    if "sft" in trained:
        conditions.append(Condition(name="SFT, prompt only", adapter=trained["sft"], shows_proposals=False))
    if "aft" in trained:
        conditions.append(Condition(name="AFT, prompt + proposals", adapter=trained["aft"], shows_proposals=True))
    return conditions


def _identity(run: Run, model: str | None, names: Iterable[str]) -> dict[str, Any]:
    """Return what identifies the answers of a served model and of its adapters of these names."""
    assert model is not None
    serving = _serving(run, model)
    assert serving.engine is not None
    adapters = {**(serving.adapters or {})}
    used = {name for name in (*names, serving.proposer_adapter) if name in adapters}
    proposers = [(pool.share, engine_identity(pool.engine)) for pool in serving.proposers]
    return {
        "engine": engine_identity(serving.engine),
        "adapters": {name: identity(adapters[name]) for name in sorted(used)},
        "topology": serving.topology,
        "proposer_engine": engine_identity(serving.proposer_engine) if serving.proposer_engine else None,
        "proposers": proposers,
        "proposer_adapter": serving.proposer_adapter,
        "aggregator": aggregator_hash(run.config.templates),
    }
