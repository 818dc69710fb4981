"""What must hold before an adapter counts as trained; each failure is one sentence.

Trainers are known to end well having done nothing: no step taken at an epoch boundary, an adapter of empty tensors
under ZeRO-3, weights that were never handed to the optimizer. So the work is checked, not the exit status.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from aft_ray.errors import TrainingFailed
from aft_ray.training.target_head import TargetHead, predicting, target_loss_sum
from aft_ray.training.task import TrainTask

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-4}
"""Relative difference allowed between the loss in training and after reloading, by dtype of the base model."""


def check_steps(task: TrainTask, num_steps: int, metrics: list[dict[str, Any]]) -> None:
    """The planned optimizer steps were taken, and no loss was nan or infinite."""
    for row in metrics:
        if not math.isfinite(row["loss"]):
            raise TrainingFailed(
                f"variant {task.variant}: the loss is {row['loss']} at step {row['step']}; "
                "lower training.learning_rate or raise training.warmup_ratio"
            )
    if num_steps != task.num_steps or len(metrics) != task.num_steps:
        raise TrainingFailed(
            f"variant {task.variant}: {num_steps} optimizer steps taken and {len(metrics)} logged, "
            f"{task.num_steps} planned"
        )


def check_adapter(task: TrainTask, adapter: Path, start: Path | None) -> None:
    """The saved tensors are there, finite, and not those that training began from (zero for a fresh LoRA's B)."""
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


def check_frozen(task: TrainTask, moved: list[str]) -> None:
    """No frozen weight changed. Raises TrainingFailed with their names."""
    if moved:
        raise TrainingFailed(f"variant {task.variant}: frozen weights moved: {', '.join(moved)}")


def batch_loss(model: Any, batch: dict[str, torch.Tensor], head: TargetHead | None = None) -> float:
    """Mean loss over the batch's target tokens, without dropout and without gradients."""
    training = model.training
    model.eval()
    with torch.no_grad():
        loss = target_loss_sum(model, head or TargetHead(model), batch) / predicting(batch["labels"]).sum()
    model.train(training)
    return loss.item()


def check_reload(task: TrainTask, model: str, adapter: Path, batch: dict[str, torch.Tensor], expected: float) -> None:
    """A fresh base model with the saved adapter gives the loss that the trained model gave."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if task.settings["training"]["bf16"] else torch.float32
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    base = base.to(batch["input_ids"].device)
    found = batch_loss(PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False), batch)
    if not abs(found - expected) <= TOLERANCE[dtype] * max(abs(expected), 1e-2):
        raise TrainingFailed(
            f"variant {task.variant}: the saved adapter, reloaded, has loss {found:.5f} on a batch where the trained "
            f"model had {expected:.5f}"
        )
