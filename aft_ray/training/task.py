"""What to train, the identity of each adapter, and the records that report on a training.

A `TrainingJob` is what a caller asks for; it becomes one `TrainTask` per variant. A task's fingerprint covers
everything that decides the adapter: settings, base model, training-set files, variant, seed and template hashes.
Settings that only decide where the training runs or how often it restarts (`cpus_per_worker`, `max_failures`) are left
out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aft_ray.config import TrainingConfig
from aft_ray.errors import InputError
from aft_ray.records import fingerprint

Phase = Literal["starting", "training", "checking", "waiting for nodes"]
"""`starting`: workers start and load the model. `checking`: all steps are done, and the adapter is saved and proved.
`waiting for nodes`: the cluster is too small for the workers, for example after the loss of a node."""

OPERATIONAL = {"cpus_per_worker", "accelerator_type", "max_failures", "report_to"}
"""Settings that do not change the adapter. They may change on resume."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One adapter per variant, trained one after the other by the same workers.

    Driver and workers must reach every folder: use one machine, or a shared file system.
    """

    config: TrainingConfig
    model: str
    """Hub id or local folder of the base model."""
    training_set: Path
    """Folder of the training_set stage."""
    outputs: Mapping[str, Path]
    """Folder of each variant's adapter; it appears when the adapter is complete."""
    checkpoints: Path
    """Folder for the checkpoints and metrics of all variants."""
    seed: int
    template_hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each template by name; part of every adapter's fingerprint."""

    def with_absolute_paths(self) -> TrainingJob:
        """Return the same job with paths that every process resolves alike."""
        config, start = self.config, self.config.init_adapter
        if start is not None:
            config = config.model_copy(update={"init_adapter": str(Path(start).absolute())})
        return dataclasses.replace(
            self,
            config=config,
            model=str(Path(self.model).absolute()) if Path(self.model).is_dir() else self.model,
            training_set=self.training_set.absolute(),
            outputs={variant: output.absolute() for variant, output in self.outputs.items()},
            checkpoints=self.checkpoints.absolute(),
        )


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a worker needs to train one adapter. The fields are plain, so that Ray can send it."""

    variant: str
    output: Path
    """Folder of the adapter, complete or absent."""
    checkpoints: Path
    """Folder for the checkpoints and metrics of all variants."""
    settings: Mapping[str, Any]
    """The values that the fingerprint is made from."""
    num_rows: int
    num_steps: int
    """Number of optimizer steps planned."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)

    @property
    def folder(self) -> Path:
        """The folder of this variant in `checkpoints`: manifest.json, metrics.jsonl and held_out.jsonl."""
        return self.checkpoints / self.variant

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def held_out_file(self) -> Path:
        return self.folder / "held_out.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """The progress of a training."""

    variant: str
    """The variant in training. The other fields describe it alone."""
    phase: Phase
    step: int
    num_steps: int
    loss: float | None
    """Loss of the last step; None before the first step."""
    num_tokens: int
    """Tokens seen so far, without padding."""
    num_trained_tokens: int
    """Those of them that are in the loss."""
    seconds: float
    """Seconds since the call, including start-up."""
    tokens_per_second: float
    """Tokens per second of the training steps alone."""


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """The numbers of a finished training, stored as `summary.json` beside the adapter."""

    variant: str
    num_rows: int
    num_steps: int
    num_tokens: int
    num_trained_tokens: int
    first_loss: float
    last_loss: float
    seconds: float
    """Seconds for training steps and checkpoints over all attempts, without start-up and final checks."""
    startup_seconds: float
    """Seconds from the call, or from the end of the previous variant in the same workers, to the first step."""
    tokens_per_second: float
    adapter_path: str
    world_size: int
    resumed_from_step: int
    """Step of the checkpoint from which the last attempt started; 0 for a training without interruption."""
    held_out_perplexity: Mapping[str, float] | None = None
    """Perplexity after the last step, by variant of the held-out examples; None without `training.eval_steps`."""


def task_settings(job: TrainingJob, files: Mapping[str, str], variant: str) -> dict[str, Any]:
    """Return everything that decides one adapter, as plain values that can be compared and printed.

    `files`: sha256 by name of the training set's shards.
    """
    training = job.config.model_dump(mode="json", exclude=OPERATIONAL)
    return {
        "training": training | {"init_adapter": adapter_identity(job.config.init_adapter)},
        "model": model_identity(job.model),
        "training_set": dict(files),
        "variant": variant,
        "seed": job.seed,
        "templates": dict(job.template_hashes),
    }


def model_identity(model: str) -> dict[str, Any]:
    """Identify a hub model by its id, and a folder by the hash of its config and the sizes of its weight files."""
    folder = Path(model)
    if not folder.is_dir():
        return {"id": model}
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"model {model}: the folder has no config.json; expected a Hugging Face model folder")
    return {
        "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "weights": {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))},
    }


def adapter_identity(folder: str | None) -> str | None:
    """Identify an adapter by the sha256 of its weights, wherever the folder is."""
    if folder is None:
        return None
    return hashlib.sha256(Path(folder, "adapter_model.safetensors").read_bytes()).hexdigest()


def step_size(config: TrainingConfig) -> int:
    """Return the number of rows in one optimizer step, over all workers."""
    return config.batch_size_per_worker * config.num_workers * config.gradient_accumulation_steps


def planned_steps(num_rows: int, config: TrainingConfig) -> int:
    """Return the number of optimizer steps. The last batch of an epoch is filled up, so it counts as a whole one."""
    batches = math.ceil(num_rows / (config.batch_size_per_worker * config.num_workers))
    return math.ceil(config.num_epochs * math.ceil(batches / config.gradient_accumulation_steps))
