"""The engines that generate text, and the resources that their workers request from the cluster."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from aft_ray.config.endpoints import OpenAIEngineConfig
from aft_ray.config.strict import EngineSettings, Strict
from aft_ray.errors import nearest
from aft_ray.templates.families import read_template, template_hash


class _LocalEngine(EngineSettings):
    """An engine whose tokenizer is known, so that its prompts are token ids."""

    chat_template: Annotated[str, AfterValidator(read_template)] | None = None
    """Chat template for a base model that comes without one, or in place of the model's own: `chatml`, `llama3`, or the
    path of a Jinja file. Training, scoring and serving use it; a model that has not learned it samples its proposals
    with the in-context prompt (`proposals.style`)."""

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        template = found.pop("chat_template")
        return found if template is None else {**found, "chat_template": template_hash(template)}


LoraRank = Literal[0, 1, 8, 16, 32, 64, 128, 256, 320, 512]
"""The ranks that vLLM allocates for (vllm/config/lora.py, 0.29), and 0 for no adapters."""

LARGEST_LORA_RANK: int = max(get_args(LoraRank))

OWN_SETTINGS = {
    "model": "model",
    "tokenizer": "model",
    "revision": "model (OWNER/NAME#REVISION)",
    "tokenizer_revision": "model (OWNER/NAME#REVISION)",
    "max_model_len": "max_model_len",
    "dtype": "dtype",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "distributed_executor_backend": "tensor_parallel_size",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_num_seqs": "max_num_seqs",
    "enable_lora": "max_lora_rank",
    "max_lora_rank": "max_lora_rank",
    "max_loras": "max_adapters",
    "trust_remote_code": "trust_remote_code",
    "reasoning_parser": "reasoning_parser",
}
"""vLLM's arguments that follow from a setting of ours, and that setting."""


def known_parser(folder: str) -> Callable[[str], str]:
    """Return a check that vLLM has a parser of a name, which reads vLLM's own list without importing vLLM."""

    def check(name: str) -> str:
        package = importlib.util.find_spec("vllm")
        if package is None or package.origin is None:
            return name  # the machine that reads a config may be another one than that of its engines
        source = (Path(package.origin).parent / folder / "__init__.py").read_text()
        tables = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
        keys = [key for table in tables if isinstance(table, ast.Dict) for key in table.keys]
        known = sorted(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
        if name not in known:
            raise ValueError(f"vLLM has no such parser; {nearest(name, known)}")
        return name

    return check


class VllmEngineConfig(_LocalEngine):
    """vLLM. The same code runs on GPUs and CPUs."""

    OPERATIONAL = frozenset(
        {
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "gpu_memory_utilization",
            "cpu_kv_cache_gib",
            "max_num_seqs",
            "max_lora_rank",
            "max_adapters",
            "tool_parser",
        }
    )
    OPERATIONAL_ARGS: ClassVar[frozenset[str]] = frozenset(
        {
            "async_scheduling",
            "block_size",
            "compilation_config",
            "disable_custom_all_reduce",
            "disable_log_stats",
            "download_dir",
            "enable_chunked_prefill",
            "enable_prefix_caching",
            "enforce_eager",
            "ignore_patterns",
            "kv_cache_memory_bytes",
            "load_format",
            "max_cpu_loras",
            "max_num_batched_tokens",
            "max_num_partial_prefills",
            "max_parallel_loading_workers",
            "model_loader_extra_config",
            "safetensors_load_strategy",
            "scheduling_policy",
        }
    )
    """`args` that change speed and memory only, as `OPERATIONAL` does for the settings."""

    type: Literal["vllm"] = "vllm"
    """vLLM."""
    model: str
    """Hub id (`OWNER/NAME`, or `OWNER/NAME#REVISION` for a commit, tag or branch), folder, URL of a folder, or the name
    of a packaged model (`smollm2-135m-instruct`)."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Window in tokens, for prompt and answer together. None takes the window of the model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` takes the dtype in which the model was saved, or float32 on a CPU that cannot multiply in bfloat16."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of GPUs that share each layer."""
    pipeline_parallel_size: int = Field(default=1, ge=1)
    """Number of groups of GPUs that share the layers among them. All GPUs of an engine are on one node."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU's memory that the engine takes."""
    cpu_kv_cache_gib: float = Field(default=1, gt=0)
    """Size of the KV cache on a machine without a GPU."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Largest number of samples that are decoded together. None: vLLM's choice for the GPU, and 256 on a CPU."""
    max_lora_rank: LoraRank | None = None
    """Largest rank of an adapter. None: that of the adapters which are known when the engine starts (16 with
    `serving.adapters_dir`), and no adapters where there are none. 0 switches adapters off."""
    max_adapters: int = Field(default=4, ge=1)
    """Largest number of adapters in one batch."""
    seeds: bool | None = None
    """Whether each sample has its own seed, derived from the run's. None: on CPUs only. Seeds cost speed: on a GPU one
    seeded sample keeps its whole batch from using the fast sampler, and on a CPU prompts are prefilled in one piece.
    Rows and answers whose seed was not used have `seed: null`."""
    speculation: Literal["ngram", "suffix"] | None = None
    """Speculative decoding without a second model, for aggregations, whose words are often those of a draft. `ngram`
    proposes what followed the last words earlier in the prompt; `suffix` also learns from earlier answers and needs the
    package arctic-inference."""
    reasoning_parser: Annotated[str, AfterValidator(known_parser("reasoning"))] | None = None
    """Name of vLLM's parser that separates the model's thinking from its answer (`qwen3`, `deepseek_r1`, ...).
    Aggregations then see answers without the thinking, votes count those, and clients get the thinking as
    `reasoning_content`. None: the whole text is the answer."""
    tool_parser: Annotated[str, AfterValidator(known_parser("tool_parsers"))] | None = None
    """Name of vLLM's parser for the tool calls of this model (`hermes`, `llama3_json`, ...). None: requests with tools
    are refused."""
    args: dict[str, Any] = Field(default={})
    """Any other argument of vLLM's `AsyncEngineArgs`, by vLLM's own name: quantization, kv_cache_dtype,
    max_num_batched_tokens, speculative_config, enforce_eager, load_format, ..."""
    trust_remote_code: bool = False
    """Whether code in the model's repository may run. Only for repositories that you trust."""

    def identity(self) -> dict[str, Any]:
        found = super().identity()
        args = {name: value for name, value in found.pop("args").items() if name not in self.OPERATIONAL_ARGS}
        parser = found.pop("reasoning_parser")
        return {**found, "args": args, **({} if parser is None else {"reasoning_parser": parser})}

    @model_validator(mode="after")
    def _args_are_vllms(self) -> VllmEngineConfig:
        own = OWN_SETTINGS | ({"speculative_config": "speculation"} if self.speculation else {})
        known = vllm_arguments() if self.args else frozenset()
        for name in self.args:
            if name in own:
                raise ValueError(f"args.{name}: this follows from the engine's setting {own[name]}; set that instead")
            if known and name not in known:
                raise ValueError(f"args.{name}: vLLM has no such engine argument; {nearest(name, sorted(known))}")
        return self


@cache
def vllm_arguments() -> frozenset[str]:
    """Return the names of vLLM's engine arguments, from its source and without its import; none where it is absent."""
    package = importlib.util.find_spec("vllm")
    if package is None or package.origin is None:
        return frozenset()
    source = Path(package.origin).parent / "engine" / "arg_utils.py"
    classes = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)}
    return frozenset(
        line.target.id
        for name in ("EngineArgs", "AsyncEngineArgs")
        for line in classes[name].body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    )


class TransformersEngineConfig(_LocalEngine):
    """Plain `transformers.generate`. It starts in a second, runs anywhere and batches concurrent requests."""

    OPERATIONAL = frozenset({"max_batch_size", "num_threads"})

    type: Literal["transformers"] = "transformers"
    """transformers."""
    model: str
    """Hub id (`OWNER/NAME`, or `OWNER/NAME#REVISION` for a commit, tag or branch), folder, URL of a folder, or the name
    of a packaged model (`smollm2-135m-instruct`)."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Window in tokens, for prompt and answer together. None takes the window of the model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` takes the dtype in which the model was saved, or float32 on a CPU that cannot multiply in bfloat16."""
    max_batch_size: int = Field(default=32, ge=1)
    """Largest number of samples that are generated together."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads that a CPU computes with. None: as many as the worker or replica has CPUs (`num_cpus`)."""
    trust_remote_code: bool = False
    """Whether code in the model's repository may run. Only for repositories that you trust."""


class ScriptedEngineConfig(_LocalEngine):
    """A scripted stand-in for a language model, for tests and benchmarks of everything around the model."""

    OPERATIONAL = frozenset({"seconds_per_token", "slow_on", "slow_factor", "fail_requests", "dies_after"})

    type: Literal["scripted"] = "scripted"
    """The stand-in."""
    tokenizer: str | None = None
    """Folder of a tokenizer. None: the engine takes messages instead of ids."""
    max_model_len: int = 4096
    """Window in tokens, for prompt and answer together."""
    num_tokens: int = 8
    """Number of words in an answer."""
    seconds_per_token: float = 0.0
    """Seconds that each word takes."""
    answers: tuple[str, ...] = ()
    """Sample i answers `answers[i % len(answers)]`. When empty, answers are words from a hash of prompt and seed."""
    thinking: str = ""
    """What the model thinks before each answer, which the engine tells from the answer."""
    calls_tools: bool = False
    """Whether an answer with tools calls the first of them, or the one that is asked for, with its text as argument."""
    fail_on: tuple[int, ...] = ()
    """Indices of the samples that fail."""
    empty_on: tuple[int, ...] = ()
    """Indices of the samples with an empty answer."""
    slow_on: tuple[int, ...] = ()
    """Indices of the samples that take `slow_factor` times as long."""
    slow_factor: float = 10.0
    """How many times as long the samples of `slow_on` take."""
    fail_requests: bool = False
    """Whether every request raises EngineError."""
    dies_after: int | None = Field(default=None, ge=1)
    """Number of requests after which the engine is dead: it breaks off what it writes and answers nothing more."""
    follows_json_schema: bool = False
    """Whether it writes what a JSON schema asks for, by the grammars of xgrammar, one character per token."""


EngineConfig = Annotated[
    VllmEngineConfig | TransformersEngineConfig | OpenAIEngineConfig | ScriptedEngineConfig,
    Field(discriminator="type"),
]


def gpus_of(engine: EngineConfig) -> int:
    """Return the number of GPUs that one engine uses where there are GPUs."""
    match engine.type:
        case "vllm":
            return engine.tensor_parallel_size * engine.pipeline_parallel_size
        case "transformers":
            return 1
        case _:
            return 0


USUAL_NUM_SEQS = 256
"""Samples that vLLM writes at once, where its configuration does not say."""


def samples_at_once(engine: EngineConfig) -> int | None:
    """Return the number of samples that one engine writes at once; None where nothing limits it."""
    match engine.type:
        case "vllm":
            return engine.max_num_seqs or USUAL_NUM_SEQS
        case "transformers":
            return engine.max_batch_size
        case "openai":
            return engine.max_concurrency
        case "scripted":
            return None


def why_not_on_gpus(engine: EngineConfig, num_gpus: float | None) -> str | None:
    """Return why an engine cannot run in a worker that asks for `num_gpus`; None where it can.

    The reason continues a sentence that begins with the name of the setting and its value.
    """
    if num_gpus is None or engine.type == "scripted" or (num_gpus == 0 and gpus_of(engine) <= 1):
        return None
    if engine.type == "openai":
        return "but its engine is an endpoint, which uses no GPU here. Leave it out"
    if engine.type == "transformers":
        return None if num_gpus <= 1 else "but a transformers engine uses one GPU. Set 1, or use a vllm engine"
    if 0 < num_gpus < 1 and gpus_of(engine) == 1:
        if engine.gpu_memory_utilization <= num_gpus:
            return None
        return (
            f"but its engine takes gpu_memory_utilization {engine.gpu_memory_utilization:g} of a whole GPU, so the "
            "second one on the same GPU could not start. Lower that to the share of the GPU, or leave num_gpus out"
        )
    if num_gpus == gpus_of(engine):
        return None
    pipeline = engine.pipeline_parallel_size
    sizes = f"tensor_parallel_size {engine.tensor_parallel_size}" + (
        f" x pipeline_parallel_size {pipeline}" if pipeline > 1 else ""
    )
    return (
        f"but its engine has {sizes}: each worker holds one engine and needs as many GPUs. Set them equal, or leave "
        "num_gpus out"
    )


class PlacementConfig(Strict):
    """The resources that one worker of a stage requests from the Ray cluster, and the number of workers."""

    min_actors: int = Field(default=1, ge=1)
    """Number of workers that the stage starts with, and keeps while it has work."""
    max_actors: int = Field(default=1, ge=1)
    """Largest number of workers of the stage. It adds workers while shards wait, and an autoscaling cluster adds nodes
    for them."""
    num_cpus: float = Field(default=1, ge=0)
    """Number of CPUs per worker."""
    num_gpus: float | None = Field(default=None, ge=0)
    """Number of GPUs per worker. None: as many as its model uses (`gpus_of`) where the cluster has GPUs, else 0."""
    accelerator_type: str | None = None
    """Ray's label of the accelerator, such as `H100`."""
    max_shards_in_flight: int = Field(default=8, ge=1)
    """Number of shards that one worker works on at a time: enough rows to keep the batch of its engine full."""

    @model_validator(mode="after")
    def _bounds(self) -> PlacementConfig:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} < min_actors {self.min_actors}")
        return self
