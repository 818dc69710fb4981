"""The endpoint: its engines, replicas, limits and keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aft_ray.config.engines import EngineConfig
from aft_ray.config.strict import PlanField, Strict
from aft_ray.config.templates import TemplatesConfig
from aft_ray.inference.plan import Plan


class ReplicaConfig(Strict):
    """Number and resources of the replicas of one deployment."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Largest number of requests under way at one replica, and the number that autoscaling aims at."""
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    accelerator_type: str | None = None


class ProposerPoolConfig(Strict):
    """One of several models that write proposals."""

    name: str = Field(pattern="^[A-Za-z0-9-]{1,40}$")
    """Name of the pool: its deployment is called `Proposer-<name>`."""
    engine: EngineConfig
    share: float = Field(default=1, gt=0)
    """Its share of the K proposals, relative to the shares of the other pools."""
    replicas: ReplicaConfig = ReplicaConfig()


class KeyLimits(Strict):
    """Limits of one API key. None: no limit."""

    max_requests: int | None = Field(default=None, ge=1)
    """Largest number of concurrent requests."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest cost of all concurrent requests: the tokens of their prompts, and the most that their plans may write."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens per minute. A request reserves its cost when it starts and gives back what it did not use."""


class KeyConfig(KeyLimits):
    """One key of `keys_file`. The limits it sets replace those of `admission.per_key`."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the key, as `printf %s "$KEY" | sha256sum` prints it."""
    admin: bool = False
    """Whether the key may use `/admin`."""


class AdmissionConfig(Strict):
    """Limits on concurrent work, over all ingress replicas together. Requests beyond them get 429 with Retry-After."""

    max_requests: int | None = Field(default=512, ge=1)
    """Largest number of concurrent requests."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest cost of all concurrent requests: the tokens of their prompts, and the most that their plans may write."""
    per_key: KeyLimits = KeyLimits()
    """Limits of every key that sets none of its own."""


class ServingConfig(Strict):
    """The endpoint: ingress -> proposer replicas -> aggregator replicas."""

    engine: EngineConfig | None = None
    """Engine of the replicas. None: the run's `engine`."""
    proposer_engine: EngineConfig | None = None
    """`split` only: engine of the proposers. None: the same as `engine`."""
    proposers: tuple[ProposerPoolConfig, ...] = ()
    """`split` only: several models that each write their share of the proposals, without adapters. They replace
    `proposer_engine` and `proposer`. The model with the largest share writes single samples (L=0)."""
    adapters: dict[str, str] | None = None
    """Adapter folders by model name, each served in addition to the base model. None: the run's trained adapters."""
    proposer_adapter: str | None = None
    """`split` only: name of the adapter that writes the proposals of all requests. None: the adapter of the request."""
    default_model: str | None = None
    """Model that answers requests which name none. None: the last adapter, else the base model."""
    base_name: str = "base"
    """Model name of the base model."""
    topology: Literal["shared", "split"] = "shared"
    """`shared`: one pool of replicas writes proposals and aggregations. `split`: each has its own pool."""
    plan: PlanField = Plan()
    """Plan of requests that ask for none."""
    templates: TemplatesConfig = TemplatesConfig()
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    """0: any free port."""
    ingress: ReplicaConfig = ReplicaConfig(num_cpus=0.1, max_ongoing_requests=1000)
    proposer: ReplicaConfig = ReplicaConfig()
    """With `topology: shared`, the one pool of replicas."""
    aggregator: ReplicaConfig = ReplicaConfig()
    max_num_proposals: int = Field(default=16, ge=1)
    """Largest K that a request may ask for."""
    max_num_layers: int = Field(default=4, ge=0)
    """Largest L that a request may ask for."""
    max_tokens: int = Field(default=4096, ge=1)
    """Largest max_tokens that a request may ask for."""
    max_messages: int = Field(default=512, ge=1)
    """Largest number of messages in a conversation."""
    max_body_bytes: int = Field(default=2**20, ge=1024)
    """Largest body of a request; a larger one gets 413."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server from a browser, such as `https://chat.example.org`. Empty: no CORS."""
    api_keys_env: str | None = None
    """Name of the environment variable with the accepted keys, separated by commas. A host other than loopback needs
    keys from here or from `keys_file`."""
    keys_file: str | None = None
    """YAML file of hashed keys, each as `name: {sha256: ..., admin: true, max_requests: 4}`. The server reads it again
    when it changes."""
    admission: AdmissionConfig = AdmissionConfig()
    adapters_dir: str | None = None
    """Folder of adapters, each in a subfolder named after its model. New and changed ones are served in seconds."""
    ledger: str | None = None
    """Folder for one JSON line per request: key, plan, outcome, tokens by layer. It never holds a prompt."""
    stream_interval_s: float = Field(default=0.02, ge=0)
    """Tokens that follow each other within this time are sent together. The first token of an answer never waits."""

    @property
    def proposers_take_adapters(self) -> bool:
        """Whether proposers write with the request's adapter, which does not fit proposers on models of their own."""
        has_own_model = self.proposer_engine is not None or bool(self.proposers)
        return self.topology == "shared" or not has_own_model
