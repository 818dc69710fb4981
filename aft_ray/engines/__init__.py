"""The engines that generate text. `build_engine(config)` builds one, and imports its heavy libraries only then."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, assert_never

from aft_ray.engines.base import Engine, EngineEvent, EngineInfo, GenerateRequest, Sample, Sampling, TokenDelta
from aft_ray.gpus import take_assigned_gpus

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


def build_engine(
    config: EngineConfig, *, adapters: Collection[str] = (), least_lora_rank: int = 0, is_server: bool = False
) -> Engine:
    """Build the engine that `config.type` names, on the GPUs of this worker. Local engines load their model here.

    `adapters`: folders that requests will name; `least_lora_rank`: the rank to be ready for besides theirs, where more
    may come. vLLM allocates for adapters when it starts, and computes faster without. `is_server`: whether answers are
    waited for, one by one, or written in bulk. Raises ConfigError or EngineError where the engine cannot start.
    """
    if config.type in {"vllm", "transformers"}:
        take_assigned_gpus()
    match config.type:
        case "vllm":
            from aft_ray.engines.vllm import VllmEngine, lora_rank_of

            return VllmEngine(config, lora_rank_of(config, adapters, least_lora_rank), is_server=is_server)
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
