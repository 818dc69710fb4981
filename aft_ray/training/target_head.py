"""Computes the language-model head on target positions only.

AFT prompts are long, with K proposals, and their targets are short. The head over a vocabulary of 49,152 tokens is a
quarter of the work of a 135M model. TRL's fused head skips masked positions on CUDA but not on a CPU, so here the
hidden states are gathered before the head runs:

    hidden [B, T, H] --gather positions that predict a target token--> [1, N, H] --head--> logits [1, N, V]

A hook on the head does this, so the model's own code around the head still runs (scaling, soft-capping, ZeRO-3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from aft_ray.templates import IGNORE


class TargetHead:
    """A hook on the head of a model. It is installed once and active inside `on(labels)`."""

    def __init__(self, model: Any) -> None:
        self._mask: torch.Tensor | None = None
        self._hook = model.get_output_embeddings().register_forward_pre_hook(self._gather)

    @contextmanager
    def on(self, labels: torch.Tensor) -> Iterator[None]:
        """Inside this context, logits have shape [1, N, V]: one row per position that predicts a token of `labels`."""
        self._mask = predicting(labels)
        try:
            yield
        finally:
            self._mask = None

    def _gather(self, head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._mask is None:
            return None
        return (args[0][self._mask].unsqueeze(0), *args[1:])


def predicting(labels: torch.Tensor) -> torch.Tensor:
    """Return a mask [B, T] that is True where the label of the next position is in the loss."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORE
    return mask


def target_loss_sum(model: Any, head: TargetHead, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the summed cross entropy over the target tokens of a batch.

    `inputs` holds input_ids and labels, and attention_mask for padded or position_ids for packed rows.
    """
    labels = inputs["labels"]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    with head.on(labels):
        logits = model(**given, use_cache=False).logits
    return functional.cross_entropy(logits[0].float(), labels[:, 1:][labels[:, 1:] != IGNORE], reduction="sum")
