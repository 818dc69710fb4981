"""The checks that an adapter or model must pass before it counts as trained.

Trainers are known to finish without an error and without having trained: with no step at an epoch boundary, with an
adapter of empty tensors under ZeRO-3, with weights that were never given to the optimizer. So the result is checked,
not the exit status.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aft_ray.config import TrainingConfig
from aft_ray.errors import TrainingFailed
from aft_ray.training.loading import is_bf16, load_trained
from aft_ray.training.target_head import TargetHead, predicting, target_loss_sum
from aft_ray.training.task import TrainTask

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}
"""Relative difference allowed between the loss in training and after reloading, by the dtype of the computation."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The state of the model at the end of training, before it was saved."""

    num_steps: int
    """Number of optimizer steps taken."""
    changed_frozen: list[str]
    """Names of the frozen weights that changed."""
    is_unchanged: bool
    """Whether no trained weight changed."""
    batch: dict[str, torch.Tensor]
    loss: float
    """Loss of the trained model on `batch`."""


def check_ending(task: TrainTask, ending: Ending, metrics: list[dict[str, Any]], stopped_early: bool = False) -> None:
    """Check that the planned steps were taken, frozen weights kept their values and trained weights changed."""
    check_steps(task, ending.num_steps, metrics, stopped_early)
    if ending.changed_frozen:
        raise TrainingFailed(f"variant {task.variant}: frozen weights changed: {', '.join(ending.changed_frozen)}")
    if ending.is_unchanged:
        raise TrainingFailed(
            f"variant {task.variant}: no trained weight changed in {ending.num_steps} steps; "
            "is training.learning_rate too small for the weights' dtype?"
        )


def check_steps(task: TrainTask, num_steps: int, metrics: list[dict[str, Any]], stopped_early: bool = False) -> None:
    """Check that the planned optimizer steps, or those before the early stop, were taken with finite losses."""
    for row in metrics:
        if not math.isfinite(row["loss"]):
            raise TrainingFailed(
                f"variant {task.variant}: the loss is {row['loss']} at step {row['step']}; "
                "lower training.learning_rate or raise training.warmup_ratio"
            )
    planned = num_steps if stopped_early else task.num_steps
    if num_steps != planned or len(metrics) != planned:
        raise TrainingFailed(
            f"variant {task.variant}: {num_steps} optimizer steps taken and {len(metrics)} logged, {planned} planned"
        )


def check_adapter(task: TrainTask, adapter: Path, start: Path | None) -> None:
    """Check that the saved tensors are finite and differ from those at the start (zero for B of a fresh LoRA)."""
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if not tensors or empty or broken:
        what = "holds no tensors" if not tensors else f"has empty or non-finite tensors: {(empty or broken)[:3]}"
        raise TrainingFailed(f"variant {task.variant}: the saved adapter {what}")
    before = load_file(start / "adapter_model.safetensors") if start else {}
    same = [name for name, tensor in tensors.items() if ".lora_B" in name and _unchanged(tensor, before.get(name))]
    if same:
        raise TrainingFailed(f"variant {task.variant}: {len(same)} LoRA tensors did not change, such as {same[0]}")


def _unchanged(tensor: torch.Tensor, before: torch.Tensor | None) -> bool:
    if before is None:
        return not bool(tensor.any())
    return torch.equal(tensor, before.to(tensor.dtype))


def batch_loss(model: Any, batch: dict[str, torch.Tensor], head: TargetHead | None = None) -> float:
    """Return the mean loss over the target tokens of a batch, without dropout and without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = target_loss_sum(model, head or TargetHead(model), batch) / predicting(batch["labels"]).sum()
    model.train(training)
    return loss.item()


def same_loss(found: float, expected: float, dtype: str) -> bool:
    """Return whether two losses of one batch are equal within the tolerance of `dtype`. nan equals nothing."""
    return abs(found - expected) <= TOLERANCE.get(dtype, TOLERANCE["bfloat16"]) * max(abs(expected), 1e-2)


def check_reload(task: TrainTask, config: TrainingConfig, model: str, folder: Path, ending: Ending) -> None:
    """Check that the saved adapter or model, loaded again, has the loss of the trained model."""
    device = ending.batch["input_ids"].device
    trained = load_trained(config, model, folder, None if device.type == "cpu" else device)
    found = batch_loss(trained, ending.batch)
    computed_in = "bfloat16" if is_bf16(config) else "float32"  # the weights may be stored in another dtype
    if not same_loss(found, ending.loss, computed_in):
        raise TrainingFailed(
            f"variant {task.variant}: the saved result, reloaded, has loss {found:.5f} on a batch where the trained "
            f"model had {ending.loss:.5f}"
        )
