"""Who generates, and what its workers ask of the cluster."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from aft_ray.config.strict import Strict


class _Engine(Strict):
    EFFORT: ClassVar[frozenset[str]] = frozenset()
    """Settings that change how fast, how patiently or at what price answers come, and not which."""

    def deciding(self) -> dict[str, Any]:
        """What decides the answers: the engine's part of a stage's fingerprint. The rest may change on resume."""
        return self.model_dump(mode="json", exclude=set(self.EFFORT))


class VllmEngineConfig(_Engine):
    """vLLM, on GPU or CPU: the same code."""

    EFFORT = frozenset(
        {"tensor_parallel_size", "gpu_memory_utilization", "cpu_kv_cache_gib", "max_num_seqs", "max_adapters"}
    )

    type: Literal["vllm"] = "vllm"
    model: str
    """Hub id, local folder, or a packaged model (`smollm2-135m-instruct`)."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Window in tokens, prompt + answer. None: the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: as the model was saved; float32 on a CPU that cannot multiply in bfloat16."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per engine."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cpu_kv_cache_gib: float = Field(default=1, gt=0)
    """KV cache on a CPU machine."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Samples decoded together."""
    max_lora_rank: int = Field(default=16, ge=0)
    """Largest adapter rank served; 0 switches adapters off."""
    max_adapters: int = Field(default=4, ge=1)
    """Adapters that may share one batch."""
    seeds: bool = True
    """Derived per-sample seeds. On CPU they need prefill in one piece and cost about a third of the decoding speed."""
    trust_remote_code: bool = False


class TransformersEngineConfig(_Engine):
    """Plain `transformers.generate`: starts in a second, runs anywhere, batches what arrives together."""

    EFFORT = frozenset({"max_batch_size"})

    type: Literal["transformers"] = "transformers"
    model: str
    max_model_len: int | None = Field(default=None, ge=16)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: as the model was saved; float32 on a CPU that cannot multiply in bfloat16."""
    max_batch_size: int = Field(default=32, ge=1)
    """Samples generated together."""
    trust_remote_code: bool = False


class PricesConfig(Strict):
    """US dollars per million tokens."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)


class OpenAIEngineConfig(_Engine):
    """Any OpenAI-compatible endpoint: a remote teacher, a judge, another aft_ray."""

    EFFORT = frozenset({"base_url", "api_key_env", "max_concurrency", "timeout_s", "max_retries", "prices"})

    type: Literal["openai"] = "openai"
    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself never stands in a config."""
    max_model_len: int = Field(default=32768, ge=16)
    max_concurrency: int = Field(default=32, ge=1)
    """Most calls at once. A 429 halves what is allowed; every round of successes adds one again."""
    timeout_s: float = Field(default=120, gt=0)
    """For an answer to begin, and again for it to end."""
    max_retries: int = Field(default=5, ge=0)
    """Retries after 408, 409, 429, 5xx and connection errors, with the server's Retry-After or jittered backoff."""
    prices: PricesConfig | None = None
    """What the endpoint charges, for `plan` and the ledger in each manifest."""


class ScriptedEngineConfig(_Engine):
    """A scripted language model, for tests and benchmarks of everything around the model."""

    EFFORT = frozenset({"seconds_per_token", "slow_on", "slow_factor", "fail_requests"})

    type: Literal["scripted"] = "scripted"
    tokenizer: str | None = None
    """Folder of a tokenizer; None: the engine takes messages."""
    max_model_len: int = 4096
    num_tokens: int = 8
    """Words per answer."""
    seconds_per_token: float = 0.0
    answers: tuple[str, ...] = ()
    """Sample i answers `answers[i % len]`; empty: words made from a hash of prompt and seed."""
    fail_on: tuple[int, ...] = ()
    """Sample indices that fail."""
    empty_on: tuple[int, ...] = ()
    """Sample indices that answer nothing."""
    slow_on: tuple[int, ...] = ()
    slow_factor: float = 10.0
    fail_requests: bool = False
    """Every request raises EngineError."""


EngineConfig = Annotated[
    VllmEngineConfig | TransformersEngineConfig | OpenAIEngineConfig | ScriptedEngineConfig,
    Field(discriminator="type"),
]


class PlacementConfig(Strict):
    """What one worker of a stage asks of the Ray cluster, and how many workers there may be."""

    min_actors: int = Field(default=1, ge=1)
    max_actors: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    """GPUs per worker; for vLLM the tensor parallel size."""
    accelerator_type: str | None = None
    """Ray accelerator label, such as `H100`."""
    max_shards_in_flight: int = Field(default=8, ge=1)
    """Shards one worker holds open at a time: enough rows to keep the engine's batch full."""

    @model_validator(mode="after")
    def _bounds(self) -> PlacementConfig:
        if self.max_actors < self.min_actors:
            raise ValueError(f"max_actors {self.max_actors} < min_actors {self.min_actors}")
        return self
