"""The endpoint, and what is asked of it: serving and evaluation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aft_ray.config.engines import EngineConfig
from aft_ray.config.strict import PlanField, Strict
from aft_ray.config.templates import TemplatesConfig
from aft_ray.inference.plan import Plan


class ReplicaConfig(Strict):
    """Replicas of one deployment."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Per replica; also what autoscaling aims at."""
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    accelerator_type: str | None = None


class ProposerPoolConfig(Strict):
    """One of several models that draft."""

    name: str = Field(pattern="^[A-Za-z0-9-]{1,40}$")
    """Its replicas are the deployment `Proposer-<name>`."""
    engine: EngineConfig
    share: float = Field(default=1, gt=0)
    """Part of the K proposals, in proportion to the shares of the others."""
    replicas: ReplicaConfig = ReplicaConfig()


class KeyLimits(Strict):
    """What one API key may use at a time. None: no limit of its own."""

    max_requests: int | None = Field(default=None, ge=1)
    """Requests under way at once."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Sum of their costs: what their plans may write at most, and their prompts."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """A request reserves its cost and gives back what it did not use."""


class KeyConfig(KeyLimits):
    """One key of `keys_file`. Limits that are set replace those of `admission.per_key`."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the key: `printf %s "$KEY" | sha256sum`."""
    admin: bool = False
    """May use `/admin`."""


class AdmissionConfig(Strict):
    """How much is let in, over all ingress replicas together; the rest gets 429 with Retry-After."""

    max_requests: int | None = Field(default=512, ge=1)
    """Requests under way at once."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Sum of their costs: what their plans may write at most, and their prompts."""
    per_key: KeyLimits = KeyLimits()
    """For each key without limits of its own."""


class ServingConfig(Strict):
    """The endpoint: ingress -> proposer replicas -> aggregator replicas."""

    engine: EngineConfig | None = None
    """Model of the replicas. None: the run's `engine`."""
    proposer_engine: EngineConfig | None = None
    """`split` only: another model for the proposers."""
    proposers: tuple[ProposerPoolConfig, ...] = ()
    """`split` only: several models for them, each writing its share of the proposals, without adapters. Replaces
    `proposer_engine` and `proposer`. A single sample (L=0) is written by the largest share."""
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
    max_messages: int = Field(default=512, ge=1)
    """Longest conversation, in turns."""
    max_body_bytes: int = Field(default=2**20, ge=1024)
    """Largest body; a longer one gets 413."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask this server from a browser, such as `https://chat.example.org`. None: CORS is off."""
    api_keys_env: str | None = None
    """Environment variable with the accepted keys, comma separated. To bind to anything but loopback, keys must come
    from here or from `keys_file`."""
    keys_file: str | None = None
    """YAML file of hashed keys, `name: {sha256: ..., admin: true, max_requests: 4}` each; read again when it
    changes."""
    admission: AdmissionConfig = AdmissionConfig()
    adapters_dir: str | None = None
    """A folder of adapters, each in a folder of its model's name: new and changed ones are served within seconds."""
    ledger: str | None = None
    """Folder for one JSON line per request: who, which plan, how it ended, tokens by layer. Never a prompt."""
    stream_interval_s: float = Field(default=0.02, ge=0)
    """Tokens that follow each other faster travel together. The first token of an answer never waits."""


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
