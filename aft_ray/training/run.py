"""The driver's side of training: it checks a `TrainingJob`, runs it in Ray Train's workers and reports progress.

job = TrainingJob(config=config.training, model="/models/smol", training_set=run / "training_set",
                  outputs={"aft": run / "model/aft"}, checkpoints=run / "checkpoints", seed=1)
summaries = train_adapters(job, report=print)
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aft_ray.config import TrainingConfig
from aft_ray.errors import AftError, ConfigError, TrainingFailed
from aft_ray.models import resolve_model
from aft_ray.runs import begin, write_manifest
from aft_ray.storage import Folder
from aft_ray.training.adapter import finished_summary
from aft_ray.training.examples import check_examples, check_made_for, read_examples, rows_to_train, shard_files
from aft_ray.training.progress import progress_reports
from aft_ray.training.task import TrainingJob, TrainProgress, TrainSummary, TrainTask, planned_steps, task_settings
from aft_ray.training.worker import WorkerPlan, run_worker

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
    files = shard_files(job.training_set)
    check_made_for(job.training_set, job.model, job.template_hashes)
    tasks, summaries = [], {}
    for variant in job.outputs:
        task, finished = _open_task(job, task_settings(job, files, variant))
        if finished is None:
            tasks.append(task)
        else:
            summaries[variant] = finished
    return WorkerPlan(job=job, tasks=tuple(tasks), called_at=called_at), summaries


def check_before_training(config: TrainingConfig, model: str) -> None:
    """Raise ConfigError for settings that can be known to be wrong before any worker starts."""
    for tracker in config.report_to:
        if not any(importlib.util.find_spec(package) for package in TRACKERS[tracker]):
            raise ConfigError(
                f"training.report_to: {tracker} is not installed here: pip install {tracker}, or leave it out"
            )
    if config.init_adapter is not None:
        _check_init_adapter(config, Path(config.init_adapter))
    if config.pack_length is not None:
        from aft_ray.training.packing import check_can_pack

        check_can_pack(resolve_model(model))


def _check_init_adapter(config: TrainingConfig, folder: Path) -> None:
    """Raise ConfigError where the settings differ from the shape of the adapter, which would win over them."""
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


def _open_task(job: TrainingJob, settings: dict[str, Any]) -> tuple[TrainTask, TrainSummary | None]:
    """Return the task and, where its adapter is complete, the summary. Write nothing unless the task is valid."""
    variant = settings["variant"]
    table = read_examples(job.training_set, variant)
    task = TrainTask(
        variant=variant,
        output=job.outputs[variant],
        checkpoints=job.checkpoints,
        settings=settings,
        num_rows=table.num_rows,
        num_steps=planned_steps(_num_training_rows(job, variant, table.num_rows), job.config),
    )
    folder = Folder.at(task.folder)
    manifest = begin(folder, f"training/{variant}", settings)
    finished = finished_summary(task)
    if finished is None:
        check_examples(table, job.model)
        write_manifest(folder, manifest)
    return task, finished


def _num_training_rows(job: TrainingJob, variant: str, num_examples: int) -> int:
    """Number of rows that batches are made of: examples, or packs of them."""
    if job.config.pack_length is None:
        return num_examples
    return len(rows_to_train(job.training_set, variant, job.config.pack_length))


def _run(plan: WorkerPlan, report: Report | None) -> dict[str, TrainSummary]:
    import ray.train

    config = plan.job.config
    with (
        _ray(config),
        _ray_train_environment(),
        progress_reports(plan.tasks, plan.called_at, report, is_waiting=lambda: bool(_missing(config))),
    ):
        try:
            result = _fit(_trainer(plan))
        except ray.train.TrainingFailedError as error:
            raise TrainingFailed(_reason(error, config)) from error
    outcome: dict[str, Any] = result.return_value
    if isinstance(outcome["error"], AftError):
        raise outcome["error"]
    return outcome["summaries"]


def _trainer(plan: WorkerPlan) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    config = plan.job.config
    on_gpu = config.gpus_per_worker > 0
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
            storage_path=str(plan.job.checkpoints),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": _worker_environment(config)},
        ),
    )


def _resources(config: TrainingConfig) -> dict[str, float]:
    """Return the resources of one worker, by Ray's names."""
    gpus = {"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}
    return {"CPU": config.cpus_per_worker, **gpus}


def _missing(config: TrainingConfig) -> str:
    """Return in words what the cluster lacks for the workers, or an empty string where they fit."""
    import ray

    found = ray.cluster_resources()
    lacking = [
        f"training.num_workers {config.num_workers} x {amount:g} {name} = {config.num_workers * amount:g}, found "
        f"{found.get(name, 0):g}"
        for name, amount in _resources(config).items()
        if config.num_workers * amount > found.get(name, 0)
    ]
    return "; ".join(lacking)


def _worker_environment(config: TrainingConfig) -> dict[str, str]:
    threads = str(max(1, int(config.cpus_per_worker)))
    environment = {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # deprecations between the libraries
    }
    if config.gpus_per_worker == 0:
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
def _ray(config: TrainingConfig) -> Iterator[None]:
    """Use the connected Ray cluster, or start a local one for the time of the training."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        if missing := _missing(config):
            raise ConfigError(f"this machine is too small: {missing}. Lower the number of workers or their resources")
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _ray_train_environment() -> Iterator[None]:
    """Set Ray Train's switches for the time of a run. Values that are set already are kept.

    Nobody reads its metrics, and on a single node no preemption can happen: its watcher would be one more process that
    starts, and imports, before the workers do.
    """
    import ray

    wanted = {"RAY_TRAIN_METRICS_ENABLED": "0"}
    if len(ray.nodes()) == 1:
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _reason(error: Exception, config: TrainingConfig) -> str:
    """Return what happened and what to change, in one sentence."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(sign in text for sign in ("OutOfMemoryError", "out of memory", "can't allocate memory", "ActorOOM")):
        return (
            f"training ran out of memory: lower training.batch_size_per_worker (now {config.batch_size_per_worker}) "
            "and raise gradient_accumulation_steps, or set gradient_checkpointing: true or a higher ZeRO stage"
        )
    if "No space left on device" in text or "Errno 28" in text or "Disk quota exceeded" in text:
        return (
            "the disk is full: checkpoints go to <run.dir>/checkpoints (two are kept) and, while they are written, to "
            "the temporary folder; free space or choose another run.dir or TMPDIR, and run again to continue"
        )
    if "ActorDiedError" in text or "died unexpectedly" in text:
        return (
            f"a training worker died more than training.max_failures {config.max_failures} times, the last time with: "
            f"{lines[-1] if lines else error!r}. Run again to continue from the last checkpoint"
        )
    return f"training stopped: {lines[-1] if lines else repr(error)}"
