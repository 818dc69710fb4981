"""The engines that generate text. `build_engine(config)` builds one, and imports its heavy libraries only then."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from aft_ray.engines.base import Engine, EngineEvent, EngineInfo, GenerateRequest, Sample, Sampling, TokenDelta

if TYPE_CHECKING:
    from aft_ray.config import EngineConfig

__all__ = [
    "Engine",
    "EngineEvent",
    "EngineInfo",
    "GenerateRequest",
    "Sample",
    "Sampling",
    "TokenDelta",
    "build_engine",
]


def build_engine(config: EngineConfig) -> Engine:
    """Build the engine that `config.type` names. Local engines load their model here."""
    match config.type:
        case "vllm":
            from aft_ray.engines.vllm import VllmEngine

            return VllmEngine(config)
        case "transformers":
            from aft_ray.engines.transformers import TransformersEngine

            return TransformersEngine(config)
        case "openai":
            from aft_ray.engines.openai import OpenAIEngine

            return OpenAIEngine(config)
        case "scripted":
            from aft_ray.engines.scripted import ScriptedEngine

            return ScriptedEngine(config)
        case _:
            assert_never(config)
