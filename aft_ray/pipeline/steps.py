"""The steps of the line. Each one looks at the run's folder, makes what is missing, and leaves a manifest.

prompts -> proposals -> scores -> selection -> targets -> training_set -> train -> evaluate -> miniature -> report

The names, in this order, are `pipeline.LINE`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aft_ray.config import Config
from aft_ray.errors import ConfigError, PromptTooLong, ResumeRefused
from aft_ray.pipeline import LINE
from aft_ray.pipeline.cluster import RaySession
from aft_ray.progress import Progress
from aft_ray.runs import Manifest, Resume, Run
from aft_ray.shards import Stage
from aft_ray.stages import run_stage

if TYPE_CHECKING:
    from aft_ray.training import TrainProgress

Step = Callable[[Run, RaySession], None]


def run_steps(config: Config, names: Sequence[str], resume: Resume = "auto", retry_failed: bool = False) -> Run:
    """Run the named steps of a run, in the order given; returns the open run.

    With `retry_failed`, rows that failed before are retried and taken through the later steps.
    Raises ConfigError, InputError, ResumeRefused, TooManyFailures, TrainingFailed. Finished work is kept: the same
    call resumes it.
    """
    check_before_start(config)
    run = Run.open(config, resume, retry_failed)
    with RaySession(config) as session:
        for name in names:
            run.event("started", step=name)
            try:
                STEPS[name](run, session)
            except BaseException as error:
                run.event("failed", step=name, error=type(error).__name__, message=str(error)[:500])
                if isinstance(error, ResumeRefused):
                    run.restore_settings()
                raise
            run.event("finished", step=name)
    return run


def check_before_start(config: Config) -> None:
    """Refuse settings that can be known to be wrong before any model is loaded."""
    from aft_ray.data.proposals import aggregator_hash
    from aft_ray.miniature.study import study_of_run
    from aft_ray.models import PACKAGED, resolve_model
    from aft_ray.templates import InContextPrompt
    from aft_ray.training import check_before_training

    if config.miniature is not None:
        check_before_start(study_of_run(config))
    aggregator_hash(config.templates)
    InContextPrompt.load(config.templates.in_context)
    engines = (config.engine, config.proposals.engine, config.targets.engine, config.serving.engine)
    for engine in engines:
        if engine is not None and engine.type in {"vllm", "transformers"} and engine.model not in PACKAGED:
            resolve_model(engine.model)  # a folder that is not there is refused now, not after an hour
    if config.engine.type in {"vllm", "transformers"}:
        check_before_training(config.training, config.engine.model)
    _check_windows(config)
    if config.training_set.max_length > (
        getattr(config.engine, "max_model_len", None) or config.training_set.max_length
    ):
        raise ConfigError(
            f"training_set.max_length {config.training_set.max_length} > engine.max_model_len "
            f"{config.engine.max_model_len}: the model would be trained on prompts it is never served with"
        )


def _check_windows(config: Config) -> None:
    """Check sampling and aggregator prompt against the window, before any tokenizer is loaded.

    A word is at least one token, so a prompt that does not fit by words cannot fit by tokens.
    """
    from aft_ray.templates import AggregatorTemplate

    template = AggregatorTemplate.load(config.templates.aggregator)
    num_words = len(template.system.split())
    teacher = config.targets.engine or config.engine
    plan = config.evaluation.plan
    windows = [
        ("proposals.sampling", config.proposals.engine or config.engine, config.proposals.sampling, 1),
        ("evaluation.plan.proposal", config.engine, plan.proposal, 1),
    ]
    if config.targets.source == "teacher":
        windows.append(("targets.sampling", teacher, config.targets.sampling, num_words))
    if plan.num_layers:
        windows.append(("evaluation.plan.final", config.engine, plan.final, num_words))
    for key, engine, sampling, num_prompt in windows:
        window = engine.max_model_len
        if window is not None and sampling.max_tokens + num_prompt > window:
            raise PromptTooLong(
                f"{key}.max_tokens {sampling.max_tokens} + a prompt of at least {num_prompt} tokens > "
                f"max_model_len {window}: lower max_tokens, raise max_model_len, or shorten the template"
            )


def _say(manifest: Manifest) -> None:
    """Print one line for a stage that was finished before; a stage that runs prints its progress."""
    print(f"{manifest.stage:<13} done: {manifest.rows_out} rows", file=sys.stderr)


def _run_stage(stage: Stage, run: Run, session: RaySession) -> bool:
    """Run a stage and return whether there was anything to do."""
    before = run.manifest(stage.name)
    manifest = run_stage(
        stage,
        max_failure_rate=run.config.run.max_failure_rate,
        retry_failed=run.retry_failed,
        connect=session.connect,
    )
    if before == manifest:
        _say(manifest)
    return before != manifest


def prompts(run: Run, session: RaySession) -> None:
    """Read, check and shard the prompts."""
    from aft_ray.data.prompts.stage import make_prompts

    _say(make_prompts(run))


def proposals(run: Run, session: RaySession) -> None:
    """Sample proposals from the model to be trained."""
    from aft_ray.data import proposals as room

    for stage in room.stages(run):
        _run_stage(stage, run, session)


def scores(run: Run, session: RaySession) -> None:
    """Score the proposals."""
    from aft_ray.data import scores as room

    _run_stage(room.stage(run), run, session)


def selection(run: Run, session: RaySession) -> None:
    """Choose the K proposals each prompt keeps."""
    from aft_ray.data import selection as room

    _run_stage(room.stage(run), run, session)


def targets(run: Run, session: RaySession) -> None:
    """Have the teacher write the aggregations."""
    from aft_ray.data import targets as room

    _run_stage(room.stage(run), run, session)


def training_set(run: Run, session: RaySession) -> None:
    """Write ids and labels, and the data set's card."""
    from aft_ray.data import training_set as room
    from aft_ray.data.card import CARD, write_card

    has_changed = _run_stage(room.stage(run), run, session)
    if has_changed or not run.folder.child("training_set").exists(CARD):
        write_card(run)


def train(run: Run, session: RaySession) -> None:
    """Fine-tune one adapter per variant."""
    from aft_ray.data.proposals import aggregator_hash
    from aft_ray.models import resolve_model
    from aft_ray.training import TrainingJob, train_adapters

    config = run.config
    if config.engine.type not in {"vllm", "transformers"}:
        raise ConfigError(f"engine.type {config.engine.type}: training needs a local model (vllm or transformers)")
    if not run.folder.is_local:
        raise ConfigError(
            f"run.dir {config.run.dir}: training writes checkpoints and needs a (shared) file system path"
        )
    folder = Path(run.folder.path)
    outputs: dict[str, Path] = {variant: folder / "model" / variant for variant in config.training_set.variants}
    job = TrainingJob(
        config=config.training,
        model=resolve_model(config.engine.model),
        training_set=folder / "training_set",
        outputs=outputs,
        checkpoints=folder / "checkpoints",
        seed=config.run.seed,
        template_hashes={"aggregator": aggregator_hash(config.templates)},
    )
    if all(output.is_dir() for output in outputs.values()):
        num_steps = sum(summary.num_steps for summary in train_adapters(job).values())
        print(f"{'train':<13} done: {num_steps} steps, {' and '.join(outputs)}", file=sys.stderr)
        return
    session.connect()
    with Progress("train", total=0, unit="steps") as progress:
        summaries = train_adapters(job, report=partial(show_training, progress, {}))
    for summary in summaries.values():
        run.event("trained", **dataclasses.asdict(summary))


def show_training(progress: Progress, seen: dict[str, TrainProgress], state: TrainProgress) -> None:
    """Show the steps and tokens of all variants so far, and what the current one is doing."""
    seen[state.variant] = state
    loss = "" if state.loss is None else f", loss {state.loss:.3f}"
    progress.total = sum(one.num_steps for one in seen.values())
    progress.update(
        done=sum(one.step for one in seen.values()),
        tokens=sum(one.num_tokens for one in seen.values()),
        note=f"{state.phase} {state.variant}{loss}",
    )


def evaluate(run: Run, session: RaySession) -> None:
    """Ask every system the held-out prompts and score the targets."""
    from aft_ray.pipeline.evaluate import evaluate as work

    work(run, session)


def miniature(run: Run, session: RaySession) -> None:
    """Run the study of the method that the config names, if it names one."""
    from aft_ray.miniature.study import run_study, study_of_run

    if run.config.miniature is not None:
        run_study(study_of_run(run.config), num_seeds=1, run_line=partial(run_steps, names=LINE))


def report(run: Run, session: RaySession) -> None:
    """Write report.html and results.json."""
    from aft_ray.pipeline.summary import report as work

    work(run)


STEPS: dict[str, Step] = {
    "prompts": prompts,
    "proposals": proposals,
    "scores": scores,
    "selection": selection,
    "targets": targets,
    "training_set": training_set,
    "train": train,
    "evaluate": evaluate,
    "miniature": miniature,
    "report": report,
}
