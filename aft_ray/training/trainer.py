"""TRL's `SFTTrainer` with the head on target positions, batches of similar length, and the callbacks of a run.

Everything else comes from TRL and transformers: LoRA, DeepSpeed, optimizer, schedule, checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray.train
import torch
from peft.utils import ModulesToSaveWrapper
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import SFTTrainer

from aft_ray.metrics import count_step, count_training_start
from aft_ray.training.examples import batch_order
from aft_ray.training.metrics import MetricsFile
from aft_ray.training.rows import lengths_in
from aft_ray.training.target_head import TargetHead, predicting, target_loss_sum
from aft_ray.training.task import TrainTask

NUM_WEIGHT_SUMS = 8
"""Number of tensors, spread over the model, whose checksums are compared."""


class BatchOrder(Sampler[int]):
    """`batch_order` as a sampler for a data loader. `EpochOrder` sets its epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(batch_order(self.lengths, self.batch_size, self.seed, self.epoch))


class TargetTrainer(SFTTrainer):
    """`SFTTrainer` on rows that hold input_ids and labels."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tokens = torch.zeros(2, dtype=torch.long, device=self.args.device)
        self.head = TargetHead(self.model)
        """Computes every loss on target positions: of steps, held-out examples, the packing check and the proof."""

    @property
    def has_fused_head(self) -> bool:
        """Whether TRL's fused head computes the loss of training steps. It would read the weights of a head that is
        trained as one of `lora.modules_to_save` from before the training.
        """
        model: Any = self.model
        is_copy = isinstance(model.get_output_embeddings(), ModulesToSaveWrapper)
        return self.args.device.type == "cuda" and not is_copy

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the target tokens of the optimizer step: all workers, all accumulated batches.

        `num_items_in_batch` is their number. Gradients are averaged over workers, so the sum of each worker is divided
        by that number and multiplied by the number of workers, as in transformers.
        """
        self._count(inputs)
        if self.has_fused_head:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert not return_outputs, "the logits are never complete here"
        total = target_loss_sum(model, self.head, inputs)
        if num_items_in_batch is None:
            return total / predicting(inputs["labels"]).sum().clamp(min=1)
        return total / num_items_in_batch * self.accelerator.num_processes

    def _count(self, inputs: dict[str, Any]) -> None:
        if self.model is not None and self.model.training:
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            trained = predicting(inputs["labels"]).sum()
            self._tokens += torch.tensor([int(seen), int(trained)], device=self._tokens.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the token counts of the step over all workers."""
        if "loss" in logs:
            tokens, trained = self.accelerator.reduce(self._tokens, reduction="sum").tolist()
            logs.update(tokens=tokens, trained_tokens=trained)
            self._tokens = torch.zeros_like(self._tokens)
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> BatchOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        batch_size = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        return BatchOrder(lengths_in(rows).tolist(), batch_size, args.seed)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: adapter.py writes that of the adapter, and checkpoints need none."""


class EpochOrder(TrainerCallback):
    """A callback that tells the sampler its epoch.

    accelerate does not reach a sampler behind both its skipping and its sharding wrapper
    (`DataLoaderShard.set_epoch`), so an epoch that several workers resume would get the order of epoch 0.
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layer = kwargs["train_dataloader"].batch_sampler
        while not isinstance(getattr(layer, "sampler", None), BatchOrder):
            layer = layer.batch_sampler
        layer.sampler.set_epoch(int(state.epoch + 1e-6))


class StepLog(TrainerCallback):
    """A callback that writes metrics.jsonl, counts the steps for Prometheus, and stops at a loss that is not finite."""

    def __init__(self, task: TrainTask) -> None:
        self.file, self.run, self.variant = MetricsFile(task.folder), task.run, task.variant
        self.began_at = self._last = 0.0
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began_at, self._last, self.first_step = time.time(), time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self.file.begin(state.global_step)
            count_training_start(self.run, self.variant)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        now = time.monotonic()
        names = ("loss", "tokens", "trained_tokens", "learning_rate", "grad_norm")
        row = {"step": state.global_step, **{name: logs[name] for name in names if name in logs}}
        row["seconds"], self._last = round(now - self._last, 4), now
        if state.is_world_process_zero:
            self.file.append(row)
            count_step(self.run, self.variant, row)
        if not math.isfinite(logs["loss"]):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the lines appear before the checkpoint from which a resumed training would go on."""
        if state.is_world_process_zero:
            self.file.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_save(args, state, control)


class RayCheckpoints(TrainerCallback):
    """A callback that hands every checkpoint to Ray Train, which keeps the last two for restarted workers.

    Each worker saves into its own folder and reports it, and Ray Train merges them. So nothing is written twice, and a
    checkpoint counts only when all workers have reported theirs.
    """

    def __init__(self, task: TrainTask) -> None:
        self.task = task
        self.watches_nodes = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"  # the driver sets it (run.py)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save once when a node is about to be preempted, and continue until it is gone. All workers save together."""
        if self.watches_nodes and ray.train.get_preemption_info() is not None:
            control.should_save, self.watches_nodes = True, False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        local = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        os.makedirs(local, exist_ok=True)
        ray.train.report(
            {"variant": self.task.variant, "step": state.global_step, "fingerprint": self.task.fingerprint},
            checkpoint=ray.train.Checkpoint.from_directory(local),
            checkpoint_dir_name=f"{self.task.variant}-{state.global_step:07d}",
            delete_local_checkpoint_after_upload=True,
        )


def last_checkpoint(task: TrainTask) -> Any | None:
    """Return the newest complete checkpoint of this task, or None."""
    own = [
        reported
        for reported in ray.train.get_all_reported_checkpoints()
        if reported.metrics.get("fingerprint") == task.fingerprint
    ]
    return max(own, key=lambda reported: reported.metrics["step"]).checkpoint if own else None


class WeightSums(TrainerCallback):
    """A callback that takes checksums of a few weights before training, to compare them with those at the end."""

    def __init__(self) -> None:
        self.frozen: dict[str, str] = {}
        self.trained: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.frozen, self.trained = weight_sums(kwargs["model"], False), weight_sums(kwargs["model"], True)

    def changed_frozen(self, model: Any) -> list[str]:
        """Return the names of the frozen weights that changed."""
        now = weight_sums(model, False)
        return [name for name, value in self.frozen.items() if now.get(name) != value]

    def is_unchanged(self, model: Any) -> bool:
        """Return whether no trained weight changed."""
        return self.trained == weight_sums(model, True)


def weight_sums(model: Any, trained: bool) -> dict[str, str]:
    """Return the sha256 of a few trained or frozen weights by name; under ZeRO-3, of this worker's part of them."""
    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad == trained]
    every = max(1, len(weights) // NUM_WEIGHT_SUMS)
    return {name: _sum(getattr(weight, "ds_tensor", weight)) for name, weight in weights[::every]}


def _sum(weight: torch.Tensor) -> str:
    content = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()
