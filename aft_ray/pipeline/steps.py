"""The steps of the line. Each one looks at the run's folder, makes what is missing, and leaves a manifest.

prompts -> proposals -> scores -> selection -> targets -> target_scores -> training_set
        -> train -> evaluate -> miniature -> report

The names, in this order, are `pipeline.LINE`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from aft_ray.config import Config
from aft_ray.data import DATA_STAGES
from aft_ray.data.proposals import data_stages
from aft_ray.errors import ConfigError, ResumeRefused
from aft_ray.pipeline import LINE
from aft_ray.pipeline.checks import check_before_start, check_tasks
from aft_ray.pipeline.cluster import RaySession
from aft_ray.pipeline.endpoints import check_endpoints
from aft_ray.pipeline.environment import read_environment
from aft_ray.pipeline.running import run_in, say
from aft_ray.progress import Progress
from aft_ray.run_lock import RunLock
from aft_ray.runs import Resume, Run
from aft_ray.storage import Folder, check_writable

if TYPE_CHECKING:
    from aft_ray.shards import Stage
    from aft_ray.training import TrainingJob, TrainProgress

Step = Callable[[Run, RaySession], None]


def run_steps(config: Config, names: Sequence[str], resume: Resume = "auto", retry_failed: bool = False) -> Run:
    """Run the named steps of a run, in the order given; returns the open run.

    With `retry_failed`, rows that failed before are retried and taken through the later steps.
    Raises ConfigError, InputError, ResumeRefused, RunInUse, TooManyFailures, TrainingFailed. Finished work is kept:
    the same call resumes it.
    """
    read_environment(config)
    check_before_start(config)
    check_earlier(config, names[0])
    check_writable(config.run.dir)
    check_endpoints(config, names, retry_failed)
    with RunLock(Folder.at(config.run.dir)), RaySession(config) as session:
        run = Run.open(config, resume, retry_failed)
        run.folder.remove_partial()
        skipped = set() if config.makes_targets else set(DATA_STAGES) - set(data_stages(config))
        for name in (name for name in names if name not in skipped):
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


def check_earlier(config: Config, step: str) -> None:
    """Raise ResumeRefused where what a single step goes on from was made from other settings. It writes nothing.

    A whole run comes by every stage, and each one refuses other settings. A single step comes by none of those before
    it, and would go on with their work under settings that it was not made from.
    """
    from aft_ray.data.prompts.stage import check_prompts
    from aft_ray.stages import check_settings

    run = Run(config, Folder.at(config.run.dir))
    earlier = LINE[: LINE.index(step)]
    if "prompts" in earlier:
        check_prompts(run)
    for name in (name for name in DATA_STAGES[1:] if name in earlier and run.manifest(name) is not None):
        for stage in stages_of(run, name):
            check_settings(stage)
    if "train" in earlier and run.manifest("training_set") is not None and is_trained(run):
        from aft_ray.training.run import plan_training

        plan_training(training_job(run))


def prompts(run: Run, session: RaySession) -> None:
    """Read, check and shard the prompts."""
    from aft_ray.data.prompts.stage import make_prompts

    manifest = make_prompts(run)
    say(manifest)
    if manifest.num_failed:
        print(
            f"{'':<13} reasons: {run.folder.location}/prompts/failed/rows.jsonl. Mend these rows in the source, and "
            "the same command adds them",
            file=sys.stderr,
        )
    check_tasks(run.config, run.folder.child("prompts"))


def stages_of(run: Run, step: str) -> list[Stage]:
    """Return the stages of a data step that follows `prompts`: one of each proposer, none where no target is scored."""
    from aft_ray.data import proposals, scores, selection, target_scores, targets, training_set

    if step == "proposals":
        return proposals.stages(run)
    if step == "target_scores" and not run.config.scores_targets:
        return []
    rooms = {
        "scores": scores,
        "selection": selection,
        "targets": targets,
        "target_scores": target_scores,
        "training_set": training_set,
    }
    return [rooms[step].stage(run)]


def data_step(step: str, run: Run, session: RaySession) -> None:
    """Make the rows of a data step that follows `prompts`."""
    for stage in stages_of(run, step):
        run_in(run, stage, session.connect)


def training_set(run: Run, session: RaySession) -> None:
    """Write ids and labels, and the data set's card."""
    from aft_ray.data.card import card_is_current, write_card

    [stage] = stages_of(run, "training_set")
    has_changed = run_in(run, stage, session.connect)
    if has_changed or not card_is_current(run):
        write_card(run)


def training_job(run: Run) -> TrainingJob:
    """Return the training of a run, whose model must be a local one."""
    from aft_ray.data.proposals import aggregator_hash
    from aft_ray.training import TrainingJob

    config, folder = run.config, run.folder
    if config.engine.type not in {"vllm", "transformers"}:
        raise ConfigError(f"engine.type {config.engine.type}: training needs a local model (vllm or transformers)")
    return TrainingJob(
        config=config.training,
        model=config.engine.model,
        training_set=folder.child("training_set"),
        outputs={variant: folder.child(f"model/{variant}") for variant in config.training_set.variants},
        checkpoints=folder.child("checkpoints"),
        seed=config.run.seed,
        chat_template=getattr(config.engine, "chat_template", None),
        template_hashes={"aggregator": aggregator_hash(config.templates)},
    )


def is_trained(run: Run) -> bool:
    """Return whether every variant of a run's training is finished."""
    from aft_ray.training.adapter import SUMMARY

    return all(run.folder.child(f"model/{variant}").exists(SUMMARY) for variant in run.config.training_set.variants)


def train(run: Run, session: RaySession) -> None:
    """Fine-tune one adapter per variant."""
    from aft_ray.training import train_adapters

    job = training_job(run)
    if is_trained(run):
        num_steps = sum(summary.num_steps for summary in train_adapters(job).values())
        print(f"{'train':<13} done: {num_steps} steps, {' and '.join(job.outputs)}", file=sys.stderr)
        return
    session.connect()
    seen: dict[str, TrainProgress] = {}
    with Progress("train", total=0, unit="steps") as progress:

        def report_progress(state: TrainProgress) -> None:
            if state.variant not in seen:
                run.event("training", variant=state.variant, num_steps=state.num_steps)
            show_training(progress, seen, state)

        summaries = train_adapters(job, report=report_progress)
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
    **{step: partial(data_step, step) for step in DATA_STAGES[1:-1]},
    "training_set": training_set,
    "train": train,
    "evaluate": evaluate,
    "miniature": miniature,
    "report": report,
}
