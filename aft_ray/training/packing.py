"""Several examples in one row, without cross-talk.

An example keeps positions of its own (from 0) and attends to itself only: transformers builds the attention mask of a
row from where its position ids begin again, and flash-attn gets the same boundaries. Rows are filled by best fit
decreasing (TRL's `pack_dataset`); no example is cut.

    padded      [a a a a . .]  [b b b . . .]  [c c . . . .]      18 places for 9 tokens
    packed      [a a a a c c]  [b b b]                           row 1 has positions 0 1 2 3 0 1
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import TrainerCallback

from aft_ray.errors import ConfigError, InputError, TrainingFailed
from aft_ray.training.target_head import TargetHead, predicting, target_loss_sum

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4}
"""Relative difference allowed between the loss of a packed row and of its examples one by one."""


def pack(rows: Any, length: int) -> Any:
    """A `datasets.Dataset` of input_ids and labels -> one of fuller rows, with `seq_lengths`: the examples in each.

    Raises InputError for an example longer than `length`, which packing would cut.
    """
    from datasets import disable_progress_bars
    from trl.data_utils import pack_dataset

    disable_progress_bars()

    longest = max(map(len, rows["input_ids"]))
    if longest > length:
        raise InputError(f"training.pack_length {length}: the longest example has {longest} tokens. Raise pack_length")
    return pack_dataset(rows, length, "bfd")


def check_can_pack(model: str) -> None:
    """Raises ConfigError for a model that is known, by its class alone, to carry one example into the next.

    Other models are measured before the first step (`PackingCheck`).
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(AutoConfig.from_pretrained(model)), None)
    if found is None:  # a class of the model's own
        return
    reason = ""
    if "position_ids" not in inspect.signature(found.forward).parameters:
        reason = "takes no position ids, by which its attention would know where an example begins"
    elif found._is_stateful:
        reason = "has a recurrent state that runs on from one example into the next"
    if reason:
        raise ConfigError(f"training.pack_length: {found.__name__} {reason}. Set pack_length: null")


def fullest_row(rows: Any) -> dict[str, Any]:
    """The row with the most examples: where cross-talk would show."""
    counts = [len(lengths) for lengths in rows["seq_lengths"]]
    return rows[counts.index(max(counts))]


class PackingCheck(TrainerCallback):
    """Before the first step, and after DeepSpeed has taken the model: does a packed row have its examples' loss?"""

    def __init__(self, row: dict[str, torch.Tensor], head: TargetHead) -> None:
        self.row, self.head = row, head

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_packing(kwargs["model"], self.head, self.row)


def check_packing(model: Any, head: TargetHead, batch: dict[str, torch.Tensor]) -> None:
    """A packed row has the loss of its examples taken one by one.

    Raises TrainingFailed for a model whose attention ignores positions: its examples would see each other.
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
