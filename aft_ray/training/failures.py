"""What ends a training, and what Ray Train does about it: whether to start the workers again, to wait, or to stop.

Ray Train starts the workers again after any failure, up to `training.max_failures` times, and waits for nodes for ever.
The callbacks of this module run in its controller and end a training that neither can help. `reason` words what
happened, in one sentence that says what to change.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import RayTrainError
from ray.train.v2._internal.execution.callback import ControllerCallback

from aft_ray.cluster_fit import check_fits, resources_of_worker
from aft_ray.config import TrainingConfig
from aft_ray.errors import AftError

OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "ActorOOM")
FULL_DISK = ("No space left on device", "Errno 28", "Disk quota exceeded")


def is_curable(error: BaseException) -> bool:
    """Return whether starting the workers again may help: after errors of processes, networks, storage and GPUs.

    A setting, a model or a row that is wrong stays wrong, and so does a lack of memory or disk space.
    """
    if isinstance(error, RayError | RayTrainError):
        return True
    if isinstance(error, OSError):  # storage and connections, also those of this package
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    text = f"{type(error).__name__}: {error}"
    is_own = isinstance(error, AftError | NotImplementedError | RecursionError)
    return isinstance(error, RuntimeError) and not is_own and not any(sign in text for sign in OUT_OF_MEMORY)


class StopWhatNoRestartCures(UserCallback):
    """Ends the training at the first error of a worker that would come again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raise that error, which ends the training. While a worker is dead, the others' errors follow from that."""
        errors = list(worker_exceptions.values())
        if any(isinstance(error, RayError | RayTrainError) for error in errors):
            return
        for error in errors:
            if not is_curable(error):
                raise error


class StopVainWaiting(ControllerCallback):
    """Ends a training that has waited `max_wait_s` for nodes that the cluster cannot start."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.waiting_since: float | None = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Forget the wait when the workers run."""
        if type(current_state).__name__ == "RunningState":
            self.waiting_since = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Called after every try to start the workers that timed out, about once a minute."""
        now = time.monotonic()
        self.waiting_since = self.waiting_since or now
        if now - self.waiting_since >= self.config.max_wait_s:
            check_workers_fit(self.config)


def check_workers_fit(config: TrainingConfig) -> None:
    """Raise ConfigError for workers that the cluster can never hold, with what was asked and what there is."""
    wanted = resources_of_worker(config.cpus_per_worker, config.gpus_per_worker or 0, config.accelerator_type)
    check_fits("training", wanted, config.num_workers)


def reason(error: Exception, config: TrainingConfig) -> str:
    """Return what happened and what to change, in one sentence."""
    failure = getattr(error, "controller_failure", None)
    text = f"{type(failure).__name__}: {failure}" if failure is not None else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(sign in text for sign in OUT_OF_MEMORY):
        return _with_less_memory(config)
    if any(sign in text for sign in FULL_DISK):
        return (
            "the disk is full: checkpoints go to <run.dir>/checkpoints (two are kept) and, while they are written, to "
            "the temporary folder, and the rows to $AFT_RAY_CACHE; free space or choose other folders, and run again "
            "to continue"
        )
    if "have NCCL built in" in text:
        return (
            f"training.gpus_per_worker is {config.gpus_per_worker or 0:g}, but PyTorch on the workers is the build for "
            "CPUs (requirements/cpu.txt): install requirements/gpu.txt there, or set training.gpus_per_worker: 0"
        )
    if "ActorDiedError" in text or "died unexpectedly" in text:
        return (
            f"a training worker died more than training.max_failures {config.max_failures} times, the last time with: "
            f"{lines[-1] if lines else error!r}. Run again to continue from the last checkpoint"
        )
    return f"training stopped: {lines[-1] if lines else repr(error)}"


def _with_less_memory(config: TrainingConfig) -> str:
    settings = less_memory(config)
    if not settings:
        return (
            "training ran out of memory with one row per step and worker and with gradient checkpointing: use GPUs "
            "with more memory, or set a lower training_set.max_length in another run.dir"
        )
    options = " ".join(f"--set training.{name}={value}" for name, value in settings.items())
    return f"training ran out of memory: run the same command with {options} to continue from the last checkpoint"


def less_memory(config: TrainingConfig) -> dict[str, str]:
    """Return settings that need less memory and may change on resume; none where there are no more."""
    settings: dict[str, str] = {}
    size = config.batch_size_per_worker
    if size > 1:
        factor = next(factor for factor in range(2, size + 1) if size % factor == 0)
        settings["batch_size_per_worker"] = str(size // factor)
        settings["gradient_accumulation_steps"] = str(config.gradient_accumulation_steps * factor)
    if not config.gradient_checkpointing:
        settings["gradient_checkpointing"] = "true"
    if not settings and config.deepspeed in ("zero2", "zero3"):
        settings["deepspeed"] = f"{config.deepspeed}_offload"
    return settings


def original(error: Exception) -> AftError | None:
    """Return the error of this package that ended the training, or None."""
    failure = getattr(error, "controller_failure", None)
    return failure if isinstance(failure, AftError) else None
