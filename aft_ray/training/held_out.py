"""Evaluation on held-out examples during training: their loss with and without proposals, and a few answers.

Every `training.eval_steps` steps, and after the last one, held_out.jsonl gets a line:

    {"step": 100, "loss": {"sft": 1.91, "aft": 1.07}, "perplexity": {"sft": 6.75, "aft": 2.92},
     "answers": [{"example_id": "p-4f..-aft", "target": "...", "answer": "..."}]}

`sft` are the held-out prompts alone and `aft` the same prompts with their proposals, and likewise for every variant in
the training set: the two curves of the paper's Figure 6, for the weights at that step. Losses are means over target
tokens. Answers are greedy and belong to held-out examples of the variant in training.

The loss of the variant in training also decides where `training.early_stopping_patience` ends it, whose last line has
"stops": true, and which state is kept for `training.load_best_model_at_end` (best.py).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from aft_ray.config import TrainingConfig
from aft_ray.records import HELD_OUT
from aft_ray.storage import Folder
from aft_ray.templates import answer_spans
from aft_ray.training.best import Best, evaluations_since_best, keep_best, kept_best
from aft_ray.training.metrics import HELD_OUT as HELD_OUT_FILE
from aft_ray.training.metrics import MetricsFile
from aft_ray.training.rows import all_variants, first_examples
from aft_ray.training.target_head import predicting, target_loss_sum
from aft_ray.training.task import TrainTask

Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


class HeldOutLog(TrainerCallback):
    """A callback that evaluates on all workers and writes on the first."""

    def __init__(self, task: TrainTask, config: TrainingConfig, training_set: Folder, tokenizer: Any, pad: Collate):
        self.task, self.config, self.tokenizer, self.pad = task, config, tokenizer, pad
        self.file = MetricsFile(task.folder, HELD_OUT_FILE)
        self.head: Any = None
        self.accelerator: Any = None
        self.trainer: Any = None
        self.proof_batch: dict[str, torch.Tensor] = {}
        self.scratch = Path()
        self.best: Best | None = None
        self.losses: list[float] = []
        """Of the variant in training, at every evaluation so far."""
        self.examples = {
            variant: rows
            for variant in all_variants(training_set)
            if (rows := first_examples(training_set, variant, config.num_eval_examples, HELD_OUT))
        }

    def attach(self, trainer: Any, proof_batch: dict[str, torch.Tensor], scratch: Path) -> None:
        """Take from the trainer what callbacks are not given, the batch of the proof, and a folder for a while."""
        self.trainer, self.proof_batch, self.scratch = trainer, proof_batch, scratch
        self.accelerator = trainer.accelerator
        self.head = trainer.head

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = [row for row in self.task.folder.json_lines(HELD_OUT_FILE) if row["step"] <= state.global_step]
        self.losses = [row["loss"][self.task.variant] for row in rows if self.task.variant in row["loss"]]
        self.best = kept_best(self.task.folder) if self.task.exports_best else None
        if state.is_world_process_zero:
            self.file.begin(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.config.eval_steps is not None
        if state.global_step % self.config.eval_steps and state.global_step != state.max_steps:
            return
        model = kwargs["model"]
        model.eval()
        with torch.no_grad():
            losses = {variant: self._loss(model, rows) for variant, rows in self.examples.items()}
            answers = [self._answer(model, row) for row in self._answered()]
        model.train()
        if self.config.watches_held_out:
            self.losses.append(losses[self.task.variant])
        if self.task.exports_best and (self.best is None or self.losses[-1] < self.best.loss):
            self._keep(state.global_step)
        stops = self._is_out_of_patience() and state.global_step < state.max_steps
        if state.is_world_process_zero:
            perplexity = {variant: math.exp(min(loss, 700)) for variant, loss in losses.items()}
            row = {"step": state.global_step, "loss": losses, "perplexity": perplexity, "answers": answers}
            self.file.append(row | ({"stops": True} if stops else {}))
            self.file.flush()  # it is seldom, and long
        if stops:
            # without a checkpoint of this step: one that is resumed would be trained on, as its lines end before it
            control.should_training_stop, control.should_save = True, False

    def _is_out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and evaluations_since_best(self.losses) >= patience

    def _keep(self, step: int) -> None:
        """Keep the state of the model as the best so far. All workers save together, and the first one keeps it."""
        from aft_ray.training.proof import batch_loss

        proof_loss = batch_loss(self.trainer.model, self.proof_batch, self.head)
        self.best = Best(step=step, loss=self.losses[-1], proof_loss=proof_loss)
        saved = self.scratch / "best"
        self.trainer.save_model(str(saved))
        if self.trainer.is_world_process_zero():
            keep_best(self.task.folder, self.best, saved)
        shutil.rmtree(saved, ignore_errors=True)

    def _loss(self, model: Any, rows: Sequence[dict[str, Any]]) -> float:
        """Return the mean loss over target tokens. As ZeRO-3 requires, all workers make as many forward passes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        size = self.config.batch_size_per_worker
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        sums = torch.zeros(2, dtype=torch.double)
        for turn in range(math.ceil(len(batches) / world)):
            place = turn * world + rank
            batch = self._batch(batches[min(place, len(batches) - 1)])
            found = target_loss_sum(model, self.head, batch).item(), predicting(batch["labels"]).sum().item()
            if place < len(batches):  # otherwise this pass only keeps the workers in step
                sums += torch.tensor(found, dtype=torch.double)
        total, count = self.accelerator.reduce(sums.float().to(self.accelerator.device), reduction="sum").tolist()
        return total / max(count, 1)

    def _batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.pad([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
        return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    def _answered(self) -> list[dict[str, Any]]:
        return self.examples.get(self.task.variant, [])[: self.config.num_eval_answers]

    def _answer(self, model: Any, row: dict[str, Any]) -> dict[str, str]:
        """Return the answer to one example. All workers generate it: under ZeRO-3 each holds part of the weights."""
        start, end = answer_spans(row["labels"])[-1]
        target = row["labels"][start:end]
        prompt = torch.tensor([row["input_ids"][:start]])
        made = model.generate(
            input_ids=prompt.to(self.accelerator.device),
            attention_mask=torch.ones_like(prompt).to(self.accelerator.device),
            max_new_tokens=2 * len(target) + 16,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            eos_token_id=[target[-1]],
            synced_gpus=is_deepspeed_zero3_enabled() and self.accelerator.num_processes > 1,
        )
        text = self.tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
        return {
            "example_id": row["example_id"],
            "target": self.tokenizer.decode(target, skip_special_tokens=True),
            "answer": text,
        }
