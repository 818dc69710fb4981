"""One small strict model per room; a run is one YAML file.

    config = load_config(Path("configs/quickstart.yaml"), overrides=["proposals.num_per_prompt=8"])

Unknown keys are refused with the nearest known name. A YAML may start from another one with `base: other.yaml` and
then holds only its differences. Every room receives its own part and nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from aft_ray.engines.base import Sampling
from aft_ray.errors import ConfigError
from aft_ray.inference.plan import LengthPolicy, Plan


def _refuse_unknown(value: Any, known: Iterable[str]) -> Any:
    if isinstance(value, Mapping):
        names = list(known)
        for key in value:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(names))}"
                raise PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", {"key": str(key), "hint": hint})
    return value


def _known_fields(record: type) -> Callable[[Any], Any]:
    names = [field.name for field in dataclasses.fields(record)]
    return lambda value: _refuse_unknown(value, names)


SamplingField = Annotated[Sampling, BeforeValidator(_known_fields(Sampling))]
PlanField = Annotated[Plan, BeforeValidator(_known_fields(Plan))]


class Strict(BaseModel):
    """Base of every config model: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        return _refuse_unknown(value, cls.model_fields)


# ── engines ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class VllmEngineConfig(Strict):
    """vLLM, on GPU or CPU: the same code."""

    type: Literal["vllm"] = "vllm"
    model: str
    """Hub id, local folder, or a packaged model (`smollm2-135m-instruct`)."""
    max_model_len: int | None = Field(default=None, ge=16)
    """Window in tokens, prompt + answer. None: the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
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


class TransformersEngineConfig(Strict):
    """Plain `transformers.generate`: starts in a second, runs anywhere, batches what arrives together."""

    type: Literal["transformers"] = "transformers"
    model: str
    max_model_len: int | None = Field(default=None, ge=16)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_batch_size: int = Field(default=32, ge=1)
    """Samples generated together."""
    trust_remote_code: bool = False


class PricesConfig(Strict):
    """US dollars per million tokens."""

    prompt: float = Field(ge=0)
    completion: float = Field(ge=0)


class OpenAIEngineConfig(Strict):
    """Any OpenAI-compatible endpoint: a remote teacher, a judge, another aft_ray."""

    type: Literal["openai"] = "openai"
    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself never stands in a config."""
    max_model_len: int = Field(default=32768, ge=16)
    max_concurrency: int = Field(default=32, ge=1)
    """Most calls at once. A 429 halves what is allowed; every round of successes adds one again."""
    timeout_s: float = Field(default=120, gt=0)
    """Per call."""
    max_retries: int = Field(default=5, ge=0)
    """Retries after 408, 409, 429, 5xx and connection errors, with the server's Retry-After or jittered backoff."""
    prices: PricesConfig | None = None
    """What the endpoint charges, for `plan` and the ledger in each manifest."""


class ScriptedEngineConfig(Strict):
    """A scripted language model, for tests and benchmarks of everything around the model."""

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


# ── rooms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class RunSection(Strict):
    """Where a run lives and what it tolerates."""

    dir: str
    """Run folder. One folder holds one run; it is resumed or refused, never written over."""
    seed: int = 20250122
    max_failure_rate: float = Field(default=0.1, ge=0, le=1)
    """Share of a stage's rows that may fail before the run stops with exit code 3."""
    usd_per_gpu_hour: float | None = Field(default=None, ge=0)
    """Price of a GPU, for `plan`."""
    ray_address: str | None = None
    """Ray cluster; None: `RAY_ADDRESS` when set, else a local one for this run."""


class TemplatesConfig(Strict):
    """Which words go around the data."""

    aggregator: str = "aft"
    """`aft`, or a YAML file with `name`, `system`, `slot` (docs/templates.md)."""
    in_context: str = "default"
    """`default`, or a YAML file with demonstrations, for base models without a chat template."""
    length_policy: LengthPolicy = "drop_longest"


class ResponsesConfig(Strict):
    """Where a source keeps several answers to one prompt: what off-policy proposals are made from."""

    column: str | None = None
    """A list column: each item a text, or an object with the fields below."""
    columns: tuple[str, ...] = ()
    """Instead of `column`: one column per answer (`[chosen, rejected]`), a text or messages ending in the answer."""
    text: str = "text"
    """Field of an item with the answer."""
    model: str | None = "model"
    """Field of an item with the name of its model, where there is one."""
    score: str | None = None
    """Field of an item with a score the source gives; kept on the row, never taken for the run's own score."""

    @model_validator(mode="after")
    def _one_place(self) -> ResponsesConfig:
        if (self.column is None) == (not self.columns):
            raise ValueError("set either 'column' (a list column) or 'columns' (one column per answer)")
        return self


ULTRAFEEDBACK = ResponsesConfig(column="completions", text="response", model="model", score="overall_score")
"""The layout of openbmb/UltraFeedback: four completions per instruction."""


class PromptsConfig(Strict):
    """Where prompts come from, and which of them are left out."""

    source: str = "packaged:constraints"
    """`packaged:constraints`, a `.jsonl` or `.parquet` file, `hub:<dataset>[:<split>]`, `reasoning_gym:<task>`."""
    column: str | None = None
    """Column with the prompt text or messages; None: the first of `messages`, `prompt`, `query`, `instruction`,
    `question`."""
    reference_column: str | None = None
    responses: Literal["ultrafeedback"] | ResponsesConfig | None = None
    """Answers that the source brings with each prompt (off-policy proposals): a known layout, or a mapping."""
    task: str | None = None
    """Task name written on the rows: chooses the verifier. None: what the source says."""
    license: str | None = None
    """Licence of the source, for the data set's card."""
    limit: int | None = Field(default=None, ge=1)
    held_out: int = Field(default=32, ge=0)
    """Prompts kept out of training, for evaluation: chosen by a seeded hash of the prompt id."""
    on_bad_row: Literal["refuse", "fail"] = "refuse"
    """`refuse`: a row that cannot be used ends the run at once. `fail`: it goes to prompts/failed/ with its reason."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """Rows with the same conversation: an error, or all but the first left out and listed."""
    near_duplicates: float | None = Field(default=None, gt=0, le=1)
    """Leave out prompts whose Jaccard similarity of character 5-grams (MinHash) to an earlier one reaches this."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation sets, as sources: a prompt that shares `decontaminate_ngram` words in a row with one is left out."""
    decontaminate_ngram: int = Field(default=13, ge=2)
    rows_per_shard: int | None = Field(default=None, ge=1)
    """Rows per output file, the unit of resume. None: 8 at first, growing to 512, so a large run has few files."""


class ProposerConfig(Strict):
    """One of several sources of proposals."""

    source: Literal["on_policy", "off_policy"] = "on_policy"
    """`on_policy`: sampled from a model. `off_policy`: the answers that came with the prompt (`prompts.responses`)."""
    share: float = Field(default=1, gt=0)
    """Its part of `proposals.num_per_prompt`, relative to the other proposers' shares."""
    name: str | None = None
    """Model name on the rows; None: the engine's."""
    engine: EngineConfig | None = None
    """None: the run's `engine`. Another model than the run's makes its proposals off-policy, and the rows say so."""
    adapter: str | None = None
    sampling: SamplingField | None = None
    """None: `proposals.sampling`."""
    style: Literal["auto", "chat", "in_context"] = "auto"
    placement: PlacementConfig = PlacementConfig()


class ProposalsConfig(Strict):
    """Drafts sampled from the model to be trained (paper: temperature 1.0, top-k 50, top-p 0.95)."""

    num_per_prompt: int = Field(default=8, ge=1)
    sampling: SamplingField = Sampling(temperature=1.0, top_k=50, top_p=0.95)
    style: Literal["auto", "chat", "in_context"] = "auto"
    """`auto`: the chat template where the tokenizer has one, else the in-context prompt."""
    adapter: str | None = None
    """Sample from this LoRA adapter (a second round of AFT)."""
    round: int | None = Field(default=None, ge=1)
    """Round of AFT these proposals belong to, written on each. None: 1, or 2 with an adapter."""
    engine: EngineConfig | None = None
    """None: the run's `engine`."""
    proposers: tuple[ProposerConfig, ...] = ()
    """Several sources with a share each. Empty: one on-policy proposer made from the settings above."""
    too_few: Literal["keep", "fill", "drop", "fail"] = "keep"
    """A prompt with fewer usable proposals than K: `keep` it with what there is, `fill` up with samples of the last
    on-policy proposer, `drop` it (counted), or `fail` it."""
    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _possible(self) -> ProposalsConfig:
        if len(self.proposers) > self.num_per_prompt:
            raise ValueError(
                f"num_per_prompt {self.num_per_prompt} < {len(self.proposers)} proposers: one each at least"
            )
        if self.too_few == "fill" and not (self.proposers and self.proposers[-1].source == "on_policy"):
            raise ValueError("too_few 'fill' needs proposers whose last one is on_policy: it writes what is missing")
        return self

    @property
    def all_proposers(self) -> tuple[ProposerConfig, ...]:
        """The proposers in the order they write."""
        return self.proposers or (
            ProposerConfig(
                engine=self.engine,
                adapter=self.adapter,
                sampling=self.sampling,
                style=self.style,
                placement=self.placement,
            ),
        )


class JudgeConfig(Strict):
    """An LLM that compares proposals pairwise, each pair in both orders."""

    engine: EngineConfig
    sampling: SamplingField = Sampling(temperature=0.0, max_tokens=16)
    num_opponents: int | None = Field(default=None, ge=1)
    """Others each proposal is compared with, drawn by seed. None: all of them (N x (N-1) calls per prompt)."""


class LikelihoodConfig(Strict):
    """Score = log-probability of the proposal under a model."""

    engine: EngineConfig | None = None
    """None: the run's `engine`."""
    adapter: str | None = None
    per_token: bool = True
    """Mean over tokens; the plain sum favours short answers."""


class ScoresConfig(Strict):
    """How proposals are scored. `none` leaves every score None; nothing is made up."""

    scorer: Literal[
        "auto",
        "constraints",
        "numeric",
        "reasoning_gym",
        "ifeval",
        "agreement",
        "length",
        "reward_model",
        "judge",
        "likelihood",
        "none",
    ] = "auto"
    """`auto`: the verifier of the row's task, `none` where it has none. `length` is a control, not a reward."""
    reward_model: str | None = None
    """Hub id or folder of a sequence-classification reward model, for scorer `reward_model`."""
    judge: JudgeConfig | None = None
    """For scorer `judge`."""
    likelihood: LikelihoodConfig = LikelihoodConfig()
    """For scorer `likelihood`."""
    placement: PlacementConfig = PlacementConfig()


class SelectionConfig(Strict):
    """Which K proposals a prompt keeps, and which prompts are kept at all."""

    num_proposals: int = Field(default=4, ge=1)
    """K."""
    strategy: Literal["top_k", "random", "stratified", "diverse"] = "top_k"
    """`top_k` by score. `stratified`: K spread evenly over the ranks, best to worst (matched-quality studies).
    `diverse`: maximal marginal relevance. Unscored proposals come last, by a seeded draw; the reason is on the row."""
    diversity: float = Field(default=0.5, ge=0, le=1)
    """`diverse`: weight of being unlike those already kept (Jaccard similarity of word 3-grams) against the score."""
    easy_per_hard: float | None = Field(default=None, ge=0)
    """With verifiable answers: keep every prompt whose majority answer is wrong (hard), and this many easy ones for
    each of them (AggLM, arXiv 2509.06870). None: keep all prompts. Held-out prompts are always kept."""
    shuffle: bool = True
    """Seeded random order of the kept ones, so that position does not give the best away."""
    placement: PlacementConfig = PlacementConfig()


class TargetFilters(Strict):
    """Targets that are not trained on, each counted by reason. An empty one never is."""

    truncated: bool = True
    refused: bool = True
    """The target declines to answer."""
    max_copy: float | None = Field(default=None, gt=0, le=1)
    """Leave out targets at least this similar to one proposal (Jaccard of word 3-grams; 1.0 is a copy up to case and
    white space). None: keep."""
    worse_than_best: bool = False
    """Leave out targets that score below the best proposal they were written from."""


class TargetsConfig(Strict):
    """The aggregations to learn. The teacher is `engine`; without one it is the student itself (teacher-free)."""

    source: Literal["teacher", "reference"] = "teacher"
    """`reference`: the prompt's reference answer instead (an ablation); no model is asked."""
    num_candidates: int = Field(default=1, ge=1)
    """M: aggregations written per prompt."""
    keep: Literal["best", "first", "shortest", "all"] = "best"
    """Of the M: `best` by verifier and score, accepted or not; or `first`, `shortest`, `all` of those the verifier
    accepts."""
    pseudo: bool = False
    """Also let the teacher answer without seeing proposals: the targets of variant `pseudo` (paper, Table 4)."""
    filters: TargetFilters = TargetFilters()
    sampling: SamplingField = Sampling(temperature=0.7, top_p=0.95, max_tokens=1024)
    engine: EngineConfig | None = None
    """None: the run's `engine`."""
    adapter: str | None = None
    placement: PlacementConfig = PlacementConfig()


Variant = Literal["sft", "aft", "joint", "sft_reference", "no_proposals", "pseudo"]


class TrainingSetConfig(Strict):
    """Ids and labels, written once."""

    variants: tuple[Variant, ...] = ("sft", "aft")
    """`sft`: prompt -> target. `aft`: prompt + proposals -> target. `joint`: both in one set. `sft_reference`: prompt
    -> reference answer. `no_proposals`: the aggregator's prompt with its slots empty -> target. `pseudo`: prompt +
    proposals -> an answer written without them (paper, Table 4)."""
    vary_num_proposals: tuple[int, int] | None = None
    """Smallest and largest K an example shows, drawn per prompt. None: all selected proposals."""
    max_length: int = Field(default=4096, ge=16)
    """Tokens per example, prompt + target. The length policy makes room for the target; a target is never cut."""
    placement: PlacementConfig = PlacementConfig()


class LoraSettings(Strict):
    """LoRA (paper: rank 8; the rest is not published)."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (arXiv 2402.09353)."""


DeepSpeedPreset = Literal["none", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


class TrainingConfig(Strict):
    """Fine-tuning on Ray Train + DeepSpeed, one adapter (or whole model) per variant of the training set."""

    method: Literal["lora", "full"] = "lora"
    """`full`: every weight is trained, and model/<variant> holds a whole model."""
    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    accelerator_type: str | None = None
    deepspeed: DeepSpeedPreset = "zero2"
    """A packaged DeepSpeed configuration (aft_ray/training/deepspeed/); `none`: plain data parallelism."""
    lora: LoraSettings = LoraSettings()
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: QLoRA, frozen weights in 4 bits (bitsandbytes; GPU)."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto`: flash-attn where it is installed and there is a GPU, else PyTorch's own (sdpa)."""
    init_adapter: str | None = None
    """Start from this adapter instead of a fresh one (a second round)."""
    learning_rate: float = Field(default=2e-4, gt=0)
    num_epochs: float = Field(default=1, gt=0)
    batch_size_per_worker: int = Field(default=4, ge=1)
    """Examples, or packed rows, per step and worker."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    pack_length: int | None = Field(default=None, ge=16)
    """Pack examples into rows of this many tokens, each with positions and attention of its own. None: batches of
    examples of like length, padded."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Every so many steps, and at the end: loss of the held-out examples of every variant in the set, and sample
    answers. None: not during training."""
    num_eval_examples: int = Field(default=64, ge=1)
    """Held-out examples per variant."""
    num_eval_answers: int = Field(default=2, ge=0)
    """Of these, how many are answered (greedily), to be read in held_out.jsonl."""
    save_steps: int = Field(default=200, ge=1)
    bf16: bool = True
    gradient_checkpointing: bool = False
    max_failures: int = Field(default=2, ge=0)
    """Times Ray Train restarts the workers from the last checkpoint after a failure. Preempted nodes do not count."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers told of every step, through transformers; the package must be installed."""

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        targets = (self.lora.target_modules,) if isinstance(self.lora.target_modules, str) else self.lora.target_modules
        refused = {
            "quantization nf4 needs a GPU (bitsandbytes): set gpus_per_worker, or quantization: none": (
                self.quantization == "nf4" and self.gpus_per_worker == 0
            ),
            "quantization nf4 trains an adapter on frozen weights: set method: lora": (
                self.quantization == "nf4" and self.method == "full"
            ),
            f"quantization nf4 with deepspeed {self.deepspeed}: ZeRO-3 cannot split weights packed in 4 bits; "
            "use zero2": self.quantization == "nf4" and self.deepspeed.startswith("zero3"),
            "lora.target_modules with lm_head: the loss is computed from the head's own weight on target positions "
            "only, so an adapter on it would never be trained; leave it out": (
                self.method == "lora" and any("lm_head" in target for target in targets)
            ),
            "attention flash_attention_2 needs a GPU and bf16: set gpus_per_worker and bf16, or attention: auto": (
                self.attention == "flash_attention_2" and not (self.gpus_per_worker and self.bf16)
            ),
            "init_adapter starts from a LoRA: with method full start from a merged model (aft-ray export --merged)": (
                self.init_adapter is not None and self.method == "full"
            ),
        }
        for reason, holds in refused.items():
            if holds:
                raise ValueError(reason)
        return self


class ReplicaConfig(Strict):
    """Replicas of one deployment."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Per replica; also what autoscaling aims at."""
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    accelerator_type: str | None = None


class ServingConfig(Strict):
    """The endpoint: ingress -> proposer replicas -> aggregator replicas."""

    engine: EngineConfig | None = None
    """Model of the replicas. None: the run's `engine`."""
    proposer_engine: EngineConfig | None = None
    """`split` only: another model for the proposers."""
    adapters: dict[str, str] | None = None
    """Model name -> adapter folder, each served beside the base model. None: the run's trained adapters."""
    proposer_adapter: str | None = None
    """`split` only: draft with this one of `adapters`, whatever the request's model is. None: the same adapter."""
    default_model: str | None = None
    """Model name for requests that name none; None: the last adapter, else the base model."""
    base_name: str = "base"
    """Model name of the base model."""
    topology: Literal["shared", "split"] = "shared"
    """`shared`: one pool of replicas writes proposals and aggregations. `split`: a pool each."""
    plan: PlanField = Plan()
    """The server's default plan."""
    templates: TemplatesConfig = TemplatesConfig()
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    ingress: ReplicaConfig = ReplicaConfig(num_cpus=0.1, max_ongoing_requests=1000)
    proposer: ReplicaConfig = ReplicaConfig()
    """Also the one pool of `topology: shared`."""
    aggregator: ReplicaConfig = ReplicaConfig()
    max_num_proposals: int = Field(default=16, ge=1)
    """Largest K a request may ask for."""
    max_num_layers: int = Field(default=4, ge=0)
    max_tokens: int = Field(default=4096, ge=1)
    """Largest max_tokens a request may ask for."""
    api_keys_env: str | None = None
    """Environment variable with the accepted keys, comma separated. Needed to bind to anything but loopback."""


class SystemConfig(Strict):
    """One system to evaluate: a served model with a plan."""

    name: str
    model: str
    """Model name at the endpoint, such as `aft`."""
    plan: PlanField | None = None
    """None: the evaluation's plan."""


class EvaluationConfig(Strict):
    """What is asked of the endpoint, and of the targets."""

    base_url: str | None = None
    """Endpoint to evaluate; None: one is served from this run for the time of the evaluation."""
    systems: tuple[SystemConfig, ...] | None = None
    """None: every model of the run, with `plan`."""
    plan: PlanField = Plan()
    max_concurrency: int = Field(default=8, ge=1)
    """Prompts in flight."""
    num_bootstrap: int = Field(default=2000, ge=100)


class Config(Strict):
    """A whole run."""

    run: RunSection
    engine: EngineConfig
    """The model to be trained: proposals, evaluation and serving use it."""
    templates: TemplatesConfig = TemplatesConfig()
    prompts: PromptsConfig = PromptsConfig()
    proposals: ProposalsConfig = ProposalsConfig()
    scores: ScoresConfig = ScoresConfig()
    selection: SelectionConfig = SelectionConfig()
    targets: TargetsConfig = TargetsConfig()
    training_set: TrainingSetConfig = TrainingSetConfig()
    training: TrainingConfig = TrainingConfig()
    serving: ServingConfig = ServingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.selection.num_proposals > self.proposals.num_per_prompt:
            raise ValueError(
                f"selection.num_proposals {self.selection.num_proposals} > proposals.num_per_prompt "
                f"{self.proposals.num_per_prompt}: there are not that many to choose from. Raise num_per_prompt"
            )
        if "pseudo" in self.training_set.variants and not self.targets.pseudo:
            raise ValueError("training_set.variants has 'pseudo': set targets.pseudo to true, or leave the variant out")
        if self.prompts.responses is None and any(p.source == "off_policy" for p in self.proposals.proposers):
            raise ValueError("proposals.proposers has an off_policy one: name the answers' place in prompts.responses")
        if self.scores.scorer == "judge" and self.scores.judge is None:
            raise ValueError("scores.scorer is judge: name the judge's engine in scores.judge.engine")
        if self.targets.filters.worse_than_best and self.scores.scorer in {"judge", "likelihood"}:
            raise ValueError(
                f"targets.filters.worse_than_best: scores of the {self.scores.scorer} cannot be compared between a "
                "target and the proposals it was written from; use a verifier or a reward model, or switch it off"
            )
        varied = self.training_set.vary_num_proposals
        if varied and not 1 <= varied[0] <= varied[1] <= self.selection.num_proposals:
            raise ValueError(
                f"training_set.vary_num_proposals {list(varied)}: expected 1 <= smallest <= largest <= "
                f"selection.num_proposals {self.selection.num_proposals}"
            )
        pack_length = self.training.pack_length
        if pack_length is not None and pack_length < self.training_set.max_length:
            raise ValueError(
                f"training.pack_length {pack_length} < training_set.max_length {self.training_set.max_length}: "
                "an example that does not fit a row would be cut. Raise pack_length"
            )
        if self.engine.type == "openai":
            raise ValueError(
                "engine.type openai cannot be trained: name a vllm or transformers engine; "
                "a remote teacher goes to targets.engine"
            )
        return self


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's YAML, apply `a.b=value` overrides, validate.

    Raises ConfigError that names the file, the key, what was found and what is expected.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return validate(Config, raw, origin=str(path))


def validate(model: type[Any], raw: Any, origin: str) -> Any:
    """`raw` as `model`, or a ConfigError with one line per problem."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [f"{origin}: {_key_of(e['loc'])}{_message_of(e)}" for e in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _key_of(loc: tuple[int | str, ...]) -> str:
    engines = {"vllm", "transformers", "openai", "scripted"}  # tags of the engine union, not keys
    key = ".".join(str(part) for part in loc if part not in engines)
    return f"{key}: " if key else ""


def _message_of(error: Any) -> str:
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in {"unknown_key", "value_error", "missing"}:
        return message[0].lower() + message[1:]
    return f"{message[0].lower()}{message[1:]}, found {error['input']!r}"


def read_yaml(path: Path) -> dict[str, Any]:
    """One YAML mapping, laid over its `base:` when it names one (relative to the file)."""
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Runs that come with the project: configs/*.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    if "base" in raw:
        return merge(read_yaml(path.parent / raw.pop("base")), raw)
    return raw


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section. A mapping with another `type` replaces the old one."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        same_kind = (
            isinstance(old, dict)
            and isinstance(value, Mapping)
            and value.get("type", old.get("type")) == old.get("type")
        )
        merged[key] = merge(old, value) if same_kind and isinstance(old, dict) else value
    return merged


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Apply one `a.b=value` in place; the value is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected key.subkey=value")
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: '{parent}' is not a section")
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
