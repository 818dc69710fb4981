"""A sequence classifier on vLLM's pooling runner: token ids in, the one logit out. vLLM batches concurrent requests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from aft_ray.engines.gpu_memory import visible_gpus, wait_for_gpu_memory
from aft_ray.engines.vllm import _set_up_cpu
from aft_ray.engines.vllm_process import VllmProcess
from aft_ray.engines.watchdog import children, watch_over
from aft_ray.errors import ConfigError

CPU_KV_CACHE_GIB = 1.0
GPU_MEMORY_UTILIZATION = 0.9
"""Share of each GPU that the classifier takes, as `VllmEngineConfig` does by default."""


class VllmClassifier(VllmProcess):
    """One vLLM engine with a classification head of one label."""

    def __init__(self, model: str, tensor_parallel_size: int = 1) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = bool(current_platform.is_cpu())
        if on_cpu:
            _set_up_cpu(CPU_KV_CACHE_GIB)
        else:
            wait_for_gpu_memory(GPU_MEMORY_UTILIZATION, partial(visible_gpus, tensor_parallel_size))
        settings: dict[str, Any] = {"enforce_eager": True} if on_cpu else {}
        arguments = AsyncEngineArgs(
            model=model,
            runner="pooling",
            dtype="float32" if on_cpu else "bfloat16",
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=GPU_MEMORY_UTILIZATION,
            enable_log_requests=False,
            disable_log_stats=True,
            **settings,
        )
        before = children()
        try:
            self._engine = AsyncLLM.from_engine_args(arguments)
        except (ValueError, RuntimeError) as error:  # not a classifier, or no room for it
            raise ConfigError(f"vLLM cannot load {model} as a classifier: {error}") from error
        self._watchdog = watch_over(children() - before)
        self._names = itertools.count()
        self.max_model_len = int(self._engine.model_config.max_model_len)

    async def logit(self, ids: Sequence[int]) -> float:
        """Return the logit of the first label for these tokens."""
        from vllm.inputs import tokens_input
        from vllm.pooling_params import PoolingParams

        params = PoolingParams(task="classify", use_activation=False)
        outputs = self._engine.encode(tokens_input(list(ids)), params, f"classify-{next(self._names)}")
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    data = output.outputs.data
        except Exception as error:  # process boundary: the engine runs in another process
            raise self._failure(f"vLLM could not score {len(ids)} tokens", error) from error
        return float(data.flatten()[0])
