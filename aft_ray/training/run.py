"""The driver's side of training: it checks a `TrainingJob`, runs it in Ray Train's workers and reports progress.

job = TrainingJob(config=config.training, model="/models/smol", training_set=run.child("training_set"),
                  outputs={"aft": run.child("model/aft")}, checkpoints=run.child("checkpoints"), seed=1)
summaries = train_adapters(job, report=print)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aft_ray.config import TrainingConfig, validate
from aft_ray.errors import AftError, ConfigError, ResumeRefused, TrainingFailed
from aft_ray.gpus import num_gpus_of
from aft_ray.models import resolve_adapter, resolve_model
from aft_ray.records import HELD_OUT, fingerprint
from aft_ray.runs import begin, read_manifest, write_manifest
from aft_ray.training.adapter import finished_summary, is_finished
from aft_ray.training.examples import MAX_CHECKED_ROWS, check_examples, check_made_for
from aft_ray.training.progress import progress_reports
from aft_ray.training.rows import best_fit, first_examples, lengths_of, shard_hashes
from aft_ray.training.task import TrainingJob, TrainProgress, TrainSummary, TrainTask, task_settings
from aft_ray.training.worker import WorkerPlan, run_worker

logger = logging.getLogger(__name__)

RAY_TRAIN_RUN = "ray_train"
"""Name of the Ray Train run inside `checkpoints`. Ray Train resumes a run of the same name and place."""

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""The packages by which each tracker is found."""

Report = Callable[[TrainProgress], None]


def train_adapters(job: TrainingJob, report: Report | None = None) -> dict[str, TrainSummary]:
    """Train one adapter per variant and return their summaries by variant.

    A second call returns at once where the outputs are complete, and otherwise continues from the last checkpoint.
    `report` is called after every step and at least every few seconds.

    Raises InputError for an invalid training set, ResumeRefused where a folder holds other work, and TrainingFailed
    when training ended without the work it planned.
    """
    plan, summaries = plan_training(job)
    if plan.tasks:
        summaries |= _run(plan, report)
    return {variant: summaries[variant] for variant in job.outputs}


def plan_training(job: TrainingJob) -> tuple[WorkerPlan, dict[str, TrainSummary]]:
    """Check the job; return the plan for the workers, and the summaries of the adapters that are complete."""
    called_at = time.time()
    job = job.with_absolute_paths()
    check_before_training(job.config, job.model)
    model = resolve_model(job.model, weights=False)
    hashes = shard_hashes(job.training_set)
    check_made_for(job.training_set, model, job.template_hashes)
    tasks, summaries = [], {}
    for variant in job.outputs:
        task, finished = _open_task(job, task_settings(job, hashes, model, variant), model)
        if finished is None:
            tasks.append(task)
        else:
            summaries[variant] = finished
    return WorkerPlan(job=job, tasks=tuple(tasks), called_at=called_at), summaries


def check_before_training(config: TrainingConfig, model: str, max_length: int | None = None) -> None:
    """Raise ConfigError for settings that can be known to be wrong before any worker starts.

    What a model that is a folder here lacks is known, too. `max_length`: longest example of the training set to make.
    """
    for tracker in config.report_to:
        if not any(importlib.util.find_spec(package) for package in TRACKERS[tracker]):
            raise ConfigError(
                f"training.report_to: {tracker} is not installed here: pip install {tracker}, or leave it out"
            )
    if config.init_adapter is not None:
        _check_init_adapter(config, config.init_adapter)
    if config.pack_length is not None:
        from aft_ray.training.packing import check_can_pack

        check_can_pack(resolve_model(model, weights=False))
    if max_length is not None and Path(model).expanduser().is_dir():
        from aft_ray.training.loading import check_model

        check_model(config, resolve_model(model, weights=False), max_length, "training_set.max_length")


def _check_init_adapter(config: TrainingConfig, reference: str) -> None:
    """Raise ConfigError where the settings differ from the shape of the adapter, which would win over them."""
    try:
        folder = resolve_adapter(reference)
    except ConfigError as error:
        raise ConfigError(f"training.init_adapter: {error}") from error
    file = folder / "adapter_config.json"
    for needed in (file, folder / "adapter_model.safetensors"):
        if not needed.is_file():
            raise ConfigError(f"training.init_adapter: no such file: {needed}; expected a peft folder")
    adapter = json.loads(file.read_text())
    own = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
    for setting, name in own.items():
        found, wanted = adapter.get(name, False), getattr(config.lora, setting)
        if found != wanted:
            raise ConfigError(
                f"training.lora.{setting} is {wanted}, but training.init_adapter has {found}: {file}. "
                "A second round keeps the shape of its adapter; set the same value"
            )
    saved = tuple(adapter.get("modules_to_save") or ())
    if set(saved) != set(config.lora.modules_to_save):
        raise ConfigError(
            f"training.lora.modules_to_save is {list(config.lora.modules_to_save)}, but training.init_adapter has "
            f"{list(saved)}: {file}. Set the same value"
        )


def _open_task(job: TrainingJob, settings: dict[str, Any], model: str) -> tuple[TrainTask, TrainSummary | None]:
    """Return the task and, where its adapter is complete, the summary. Write nothing unless the task is valid."""
    variant = settings["variant"]
    lengths = lengths_of(job.training_set, variant).tolist()
    num_rows = len(lengths)  # that batches are made of: examples, or packs of them
    if job.config.pack_length is not None:
        num_rows = len(best_fit(lengths, job.config.pack_length))
    task = TrainTask(
        variant=variant,
        output=job.outputs[variant],
        checkpoints=job.checkpoints,
        settings=settings,
        num_rows=len(lengths),
        num_steps=job.config.planned_steps(num_rows),
    )
    task = _as_begun(task)
    manifest = begin(task.folder, f"training/{variant}", task.settings)
    finished = finished_summary(task)
    if finished is None:
        from aft_ray.training.loading import check_model

        if job.config.watches_held_out and not first_examples(job.training_set, variant, 1, HELD_OUT):
            raise ConfigError(
                f"training.load_best_model_at_end and early_stopping_patience need held-out examples, and variant "
                f"{variant} has none: set prompts.held_out, or leave them out"
            )
        never = job.config.why_never_stopped_early(task.num_steps)
        if never is not None:
            logger.warning("variant %s: %s", variant, never)
        check_model(job.config, model, max(lengths), f"the longest example of variant {variant} has")
        check_examples(first_examples(job.training_set, variant, MAX_CHECKED_ROWS), model, job.chat_template)
        write_manifest(task.folder, manifest)
    return task, finished


def _as_begun(task: TrainTask) -> TrainTask:
    """Return the task, or where it is finished, as it was begun with the optimizer's state in another form.

    Raises ResumeRefused where it is half done and that form is all that differs.
    """
    found = read_manifest(task.folder)
    if found is None:
        return task
    before, now = (dict(settings["training"]) for settings in (found.settings, task.settings))
    forms = before.pop("optimizer_state", None), now.pop("optimizer_state")
    if forms[0] == forms[1] or fingerprint({**found.settings, "training": before}) != fingerprint(
        {**task.settings, "training": now}
    ):
        return task
    if is_finished(task):
        return dataclasses.replace(task, settings=found.settings)
    raise ResumeRefused(
        f"{task.folder.location}: its checkpoints hold the state of the optimizer {forms[0]}, and this training would "
        f"read it {forms[1]}. Go on with the deepspeed and num_workers that it began with (batch_size_per_worker and "
        "gradient_accumulation_steps may change, and ZeRO may offload), or remove this folder to begin the variant anew"
    )


def _run(plan: WorkerPlan, report: Report | None) -> dict[str, TrainSummary]:
    with _ray():
        import ray.train

        from aft_ray.training.failures import check_workers_fit, original, reason

        plan = _placed(plan)
        config = plan.job.config
        check_workers_fit(config)
        with (
            _ray_train_environment(config),
            progress_reports(plan.tasks, plan.called_at, report, is_waiting=lambda: _is_too_small(config)),
        ):
            try:
                result = _fit(_trainer(plan))
            except ray.train.TrainingFailedError as error:
                raise original(error) or TrainingFailed(reason(error, config)) from error
    outcome: dict[str, Any] = result.return_value
    if isinstance(outcome["error"], AftError):
        raise outcome["error"]
    return outcome["summaries"]


def _placed(plan: WorkerPlan) -> WorkerPlan:
    """Return the plan with the number of GPUs that each worker gets on this cluster."""
    config = plan.job.config
    if config.gpus_per_worker is not None:
        return plan
    settings = config.model_dump() | {"gpus_per_worker": num_gpus_of(None, 1)}
    config = validate(TrainingConfig, settings, "training, on this cluster")  # some settings need GPUs
    return dataclasses.replace(plan, job=dataclasses.replace(plan.job, config=config))


def _trainer(plan: WorkerPlan) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from aft_ray.training.failures import StopVainWaiting, StopWhatNoRestartCures

    config, checkpoints = plan.job.config, plan.job.checkpoints
    on_gpu = bool(config.gpus_per_worker)
    return TorchTrainer(
        run_worker,  # type: ignore[arg-type]  # its return value becomes Result.return_value
        train_loop_config={"plan": plan},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=on_gpu,
            resources_per_worker=_resources(config),
            accelerator_type=config.accelerator_type,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # type checkers see V1's class under this name
            name=RAY_TRAIN_RUN,
            storage_path=checkpoints.path,
            storage_filesystem=checkpoints.fs,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[StopWhatNoRestartCures(), StopVainWaiting(config)],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": _worker_environment(config)},
        ),
    )


def _resources(config: TrainingConfig) -> dict[str, float]:
    """Return the resources of one worker, by Ray's names."""
    gpus = {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    return {"CPU": config.cpus_per_worker, **gpus}


def _is_too_small(config: TrainingConfig) -> bool:
    """Return whether the cluster has less than the workers need at the moment."""
    import ray

    found = ray.cluster_resources()
    return any(config.num_workers * amount > found.get(name, 0) for name, amount in _resources(config).items())


def _worker_environment(config: TrainingConfig) -> dict[str, str]:
    threads = str(max(1, int(config.cpus_per_worker)))
    environment = {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # deprecations between the libraries
    }
    if not config.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found nothing better
    return environment


def _fit(trainer: Any) -> Any:
    """Run Ray Train, without its own Ctrl-C handler, which ends the process with exit code 0 and stays installed."""
    if threading.current_thread() is not threading.main_thread():
        return trainer.fit()
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _ray() -> Iterator[None]:
    """Use the connected Ray cluster, or start a local one for the time of the training."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _ray_train_environment(config: TrainingConfig) -> Iterator[None]:
    """Set Ray Train's switches for the time of a run. Values that are set already are kept.

    Nobody reads its metrics, and while a single node holds all workers no preemption can happen: its watcher would be
    one more process that starts, and imports, before the workers do.
    """
    import ray

    wanted = {"RAY_TRAIN_METRICS_ENABLED": "0"}
    if len(ray.nodes()) == 1 and not _is_too_small(config):
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
