"""The engines that generate text, and the resources that their workers request from the cluster."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from aft_ray.config.strict import Strict


class _Engine(Strict):
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset()
    """Settings that change the speed, the retries or the price of answers, but not the answers. They may change on
    resume."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the answers: the engine's part of the fingerprint of a stage."""
        return self.model_dump(mode="json", exclude=set(self.OPERATIONAL))


class VllmEngineConfig(_Engine):
    """vLLM. The same code runs on GPUs and CPUs."""

    OPERATIONAL = frozenset(
        {"tensor_parallel_size", "gpu_memory_utilization", "cpu_kv_cache_gib", "max_num_seqs", "max_adapters"}
    )

    type: Literal["vllm"] = "vllm"
    model: str
    """Hub id, local folder, or the name of a packaged model (`smollm2-135m-instruct`)."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Window in tokens, for prompt and answer together. None takes the window of the model."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` takes the dtype in which the model was saved, or float32 on a CPU that cannot multiply in bfloat16."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """Number of GPUs per engine."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of each GPU's memory that the engine takes."""
    cpu_kv_cache_gib: float = Field(default=1, gt=0)
    """Size of the KV cache on a machine without a GPU."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Most samples that are decoded together."""
    max_lora_rank: int = Field(default=16, ge=0)
    """Largest rank of an adapter. 0 switches adapters off."""
    max_adapters: int = Field(default=4, ge=1)
    """Most adapters that share one batch."""
    seeds: bool = True
    """Whether each sample has its own seed, derived from the run's. On a CPU, seeds need prefill in one piece and cost
    about a third of the decoding speed."""
    trust_remote_code: bool = False


class TransformersEngineConfig(_Engine):
    """Plain `transformers.generate`. It starts in a second, runs anywhere and batches concurrent requests."""

    OPERATIONAL = frozenset({"max_batch_size"})

    type: Literal["transformers"] = "transformers"
    model: str
    max_model_len: int | None = Field(default=None, ge=16)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto` takes the dtype in which the model was saved, or float32 on a CPU that cannot multiply in bfloat16."""
    max_batch_size: int = Field(default=32, ge=1)
    """Most samples that are generated together."""
    trust_remote_code: bool = False


class PricesConfig(Strict):
    """Prices in US dollars per million tokens."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)


class OpenAIEngineConfig(_Engine):
    """Any OpenAI-compatible endpoint: a remote teacher, a judge, another aft_ray."""

    OPERATIONAL = frozenset({"base_url", "api_key_env", "max_concurrency", "timeout_s", "max_retries", "prices"})

    type: Literal["openai"] = "openai"
    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. A config never holds the key itself."""
    max_model_len: int = Field(default=32768, ge=16)
    max_concurrency: int = Field(default=32, ge=1)
    """Most concurrent calls. Each 429 halves the limit in force; every round of successes raises it by one again."""
    timeout_s: float = Field(default=120, gt=0)
    """Seconds until an answer must begin, and again until it must end."""
    max_retries: int = Field(default=5, ge=0)
    """Most retries of 408, 409, 429, 5xx and connection errors, after the server's Retry-After or jittered backoff."""
    prices: PricesConfig | None = None
    """Prices of the endpoint, from which `plan` and the manifests compute the cost."""


class ScriptedEngineConfig(_Engine):
    """A scripted stand-in for a language model, for tests and benchmarks of everything around the model."""

    OPERATIONAL = frozenset({"seconds_per_token", "slow_on", "slow_factor", "fail_requests"})

    type: Literal["scripted"] = "scripted"
    tokenizer: str | None = None
    """Folder of a tokenizer. None: the engine takes messages instead of ids."""
    max_model_len: int = 4096
    num_tokens: int = 8
    """Number of words in an answer."""
    seconds_per_token: float = 0.0
    answers: tuple[str, ...] = ()
    """Sample i answers `answers[i % len(answers)]`. When empty, answers are words from a hash of prompt and seed."""
    fail_on: tuple[int, ...] = ()
    """Indices of the samples that fail."""
    empty_on: tuple[int, ...] = ()
    """Indices of the samples with an empty answer."""
    slow_on: tuple[int, ...] = ()
    """Indices of the samples that take `slow_factor` times as long."""
    slow_factor: float = 10.0
    fail_requests: bool = False
    """Whether every request raises EngineError."""


EngineConfig = Annotated[
    VllmEngineConfig | TransformersEngineConfig | OpenAIEngineConfig | ScriptedEngineConfig,
    Field(discriminator="type"),
]


class PlacementConfig(Strict):
    """The resources that one worker of a stage requests from the Ray cluster, and the number of workers."""

    min_actors: int = Field(default=1, ge=1)
    max_actors: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    """Number of GPUs per worker. For vLLM it must equal the tensor parallel size."""
    accelerator_type: str | None = None
    """Ray's label of the accelerator, such as `H100`."""
    max_shards_in_flight: int = Field(default=8, ge=1)
    """Number of shards that one worker works on at a time: enough rows to keep the batch of its engine full."""

    @model_validator(mode="after")
    def _bounds(self) -> PlacementConfig:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} < min_actors {self.min_actors}")
        return self
