"""Checks that examples packed into one row (rows.py) cannot see each other.

Each example keeps its own positions, from 0, and attends to itself only: transformers builds the attention mask of a
row from the places where position ids restart, and flash-attn gets the same boundaries. Rows are filled by best fit
decreasing; no example is cut.

    padded      [a a a a . .]  [b b b . . .]  [c c . . . .]      18 places for 9 tokens
    packed      [a a a a c c]  [b b b]                           row 1 has positions 0 1 2 3 0 1
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import TrainerCallback

from aft_ray.errors import ConfigError, TrainingFailed
from aft_ray.training.target_head import TargetHead, predicting, target_loss_sum

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4}
"""Relative difference allowed between the loss of a packed row and that of its examples one by one."""


def check_can_pack(model: str) -> None:
    """Raise ConfigError for a model whose class alone shows that packed examples would see each other.

    For other models, `PackingCheck` measures it before the first step.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(AutoConfig.from_pretrained(model)), None)
    if found is None:  # the model brings its own class
        return
    reason = ""
    if "position_ids" not in inspect.signature(found.forward).parameters:
        reason = "takes no position ids, so its attention cannot know where an example begins"
    elif found._is_stateful:
        reason = "has a recurrent state that continues from one example into the next"
    if reason:
        raise ConfigError(f"training.pack_length: {found.__name__} {reason}. Set pack_length: null")


def fullest_row(rows: Any) -> dict[str, Any]:
    """Return the row with the most examples, in which cross-talk would show best."""
    import numpy as np
    import pyarrow.compute as pc

    row: dict[str, Any] = rows[int(np.argmax(pc.list_value_length(rows.data.column("seq_lengths"))))]
    return row


class PackingCheck(TrainerCallback):
    """A callback that runs `check_packing` before the first step, after DeepSpeed has wrapped the model."""

    def __init__(self, row: dict[str, torch.Tensor], head: TargetHead) -> None:
        self.row, self.head = row, head

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_packing(kwargs["model"], self.head, self.row)


def check_packing(model: Any, head: TargetHead, batch: dict[str, torch.Tensor]) -> None:
    """Check that a packed row has the same loss as its examples one by one.

    Raises TrainingFailed for a model whose attention ignores positions, so that its examples see each other.
    """
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        together = target_loss_sum(model, head, batch).item()
        apart = sum(
            target_loss_sum(model, head, {name: batch[name][:, start:end] for name in ("input_ids", "labels")}).item()
            for start, end in zip(starts, ends, strict=True)
            if bool(predicting(batch["labels"][:, start:end]).any())
        )
    model.train(was_training)
    dtype = next(model.parameters()).dtype
    if not abs(together - apart) <= TOLERANCE.get(dtype, 3e-2) * max(abs(apart), 1e-2):
        raise TrainingFailed(
            f"training.pack_length: {len(starts)} packed examples have loss {together:.4f} together and {apart:.4f} "
            "one by one, so this model's attention lets them see each other. Set pack_length: null"
        )
