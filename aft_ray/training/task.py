"""What to train, the identity of each adapter, and the records that report on a training.

A `TrainingJob` is what a caller asks for; it becomes one `TrainTask` per variant. A task's fingerprint covers
everything that decides the adapter: settings, base model, training-set files, variant, seed and template hashes.
Settings that cost time or memory only are left out, so they may change when a training is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aft_ray.config import TrainingConfig
from aft_ray.hub import is_hub_id
from aft_ray.records import fingerprint
from aft_ray.storage import Folder
from aft_ray.training.identity import adapter_identity, model_identity

Phase = Literal["starting", "training", "checking", "waiting for nodes"]
"""`starting`: workers start and load the model. `checking`: all steps are done, and the adapter is saved and proved.
`waiting for nodes`: the cluster is too small for the workers, for example after the loss of a node."""

OPERATIONAL = {
    "cpus_per_worker",
    "gpus_per_worker",
    "accelerator_type",
    "max_failures",
    "max_wait_s",
    "report_to",
    "save_steps",
    "attention",
    "gradient_checkpointing",
}
"""Settings that cost time or memory but do not change what is learned. They may change on resume."""
SHARES = {"batch_size_per_worker", "num_workers", "gradient_accumulation_steps"}
"""Settings that may change on resume as long as their product, the number of rows in a step, stays the same."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One adapter per variant, trained one after the other by the same workers.

    Driver and workers must reach every folder: use one machine, a shared file system, or object storage.
    """

    config: TrainingConfig
    model: str
    """Reference of the base model (models.py). Every worker resolves it on its own node."""
    chat_template: str | None = None
    """Chat template in place of the model's own (`engine.chat_template`); the trained tokenizer carries it."""
    training_set: Folder
    """Folder of the training_set stage."""
    outputs: Mapping[str, Folder]
    """Folder of each variant's adapter; it appears when the adapter is complete."""
    checkpoints: Folder
    """Folder for the checkpoints and metrics of all variants."""
    seed: int
    template_hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each template by name; part of every adapter's fingerprint."""

    def with_absolute_paths(self) -> TrainingJob:
        """Return the same job with paths that every process resolves alike."""
        config, start = self.config, self.config.init_adapter
        if start is not None and "://" not in start and not is_hub_id(start):
            config = config.model_copy(update={"init_adapter": str(Path(start).expanduser().absolute())})
        folder = Path(self.model).expanduser()
        return dataclasses.replace(self, config=config, model=str(folder.absolute()) if folder.is_dir() else self.model)


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What a worker needs to train one adapter. The fields are plain, so that Ray can send it."""

    variant: str
    output: Folder
    """Folder of the adapter, complete or absent."""
    checkpoints: Folder
    """Folder for the checkpoints and metrics of all variants."""
    settings: Mapping[str, Any]
    """The values that the fingerprint is made from."""
    num_rows: int
    num_steps: int
    """Number of optimizer steps planned. Early stopping may end the training before."""

    @property
    def exports_best(self) -> bool:
        """Whether the result is the best state instead of the last one."""
        return bool(self.settings["training"].get("load_best_model_at_end"))

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.settings)

    @property
    def folder(self) -> Folder:
        """The folder of this variant in `checkpoints`: manifest.json, metrics.jsonl and held_out.jsonl."""
        return self.checkpoints.child(self.variant)

    @property
    def run(self) -> str:
        """Name of the run: of the folder that holds `checkpoints`."""
        return self.checkpoints.path.split("/")[-2]

    @property
    def shard_hashes(self) -> dict[str, str]:
        """sha256 of each shard of the training set by file name."""
        return dict(self.settings["training_set"])


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
    """Perplexity of what is exported, by variant of the held-out examples; None without `training.eval_steps`."""
    exported_step: int | None = None
    """Step whose state is exported: the last one, or the best (`training.load_best_model_at_end`)."""
    stopped_early: bool = False
    """Whether `training.early_stopping_patience` ended the training."""


def task_settings(job: TrainingJob, hashes: Mapping[str, str], model: str, variant: str) -> dict[str, Any]:
    """Return everything that decides one adapter, as plain values that can be compared and printed.

    `hashes`: sha256 by name of the training set's shards. `model`: the resolved base model.
    """
    config = job.config
    training = config.model_dump(mode="json", exclude=OPERATIONAL | SHARES | {"deepspeed"})
    return {
        "training": training
        | {
            "init_adapter": adapter_identity(config.init_adapter),
            "rows_per_step": step_size(config),
            "optimizer_state": _optimizer_state(config),
        },
        "model": model_identity(model),
        "training_set": dict(hashes),
        "variant": variant,
        "seed": job.seed,
        "templates": dict(job.template_hashes),
    }


DIVIDED_ANEW = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose state DeepSpeed divides among another number of workers (`resharding`)."""


def _optimizer_state(config: TrainingConfig) -> str:
    """Return in which form checkpoints hold the state of the optimizer. Only a training of the same form reads it."""
    stage = config.deepspeed.removesuffix("_offload")
    if stage == "none":
        return "in one piece"  # every worker has all of it, however many there are
    stages = "zero1 or zero2" if stage in ("zero1", "zero2") else stage  # they differ in what they do with gradients
    if stage != "zero0" and config.optimizer in DIVIDED_ANEW:
        return f"as deepspeed {stages} divides it"
    return f"as deepspeed {stages} divides it among num_workers {config.num_workers}"


def step_size(config: TrainingConfig) -> int:
    """Return the number of rows in one optimizer step, over all workers."""
    return config.batch_size_per_worker * config.num_workers * config.gradient_accumulation_steps
