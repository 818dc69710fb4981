"""Who answers in one part of a run: a model, its adapter, and the format that turns text into its token ids."""

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
    """Its share of the proposals where several roles propose, relative to the shares of the others."""
