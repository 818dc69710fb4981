"""Who answers in one part of a run: a model, the adapter on it, and how text becomes its ids."""

from __future__ import annotations

from dataclasses import dataclass

from aft_ray.engines.base import Engine
from aft_ray.templates import PromptFormat


@dataclass(frozen=True, kw_only=True)
class Role:
    """The proposer (layer 0) or the aggregator (layers 1 .. L). In the paper both are the same model."""

    engine: Engine
    format: PromptFormat
    """Turns messages into the ids this engine's model was trained on."""
    adapter: str | None = None
    """Path of a LoRA adapter to answer with, or None for the base model."""
    share: float = 1.0
    """Part of the proposals it writes where several roles propose, in proportion to theirs."""
