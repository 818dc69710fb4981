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
    max_messages: int = Field(default=512, ge=1)
    """Longest conversation, in turns."""
    max_body_bytes: int = Field(default=2**20, ge=1024)
    """Largest body; a longer one gets 413."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may ask this server from a browser, such as `https://chat.example.org`. None: CORS is off."""
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
