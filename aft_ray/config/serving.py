"""The endpoint: its engines, replicas, limits and keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from aft_ray.config.engines import EngineConfig
from aft_ray.config.strict import PlanField, Strict
from aft_ray.config.templates import TemplatesConfig
from aft_ray.inference.plan import Plan


class ReplicaConfig(Strict):
    """Number and resources of the replicas of one deployment."""

    min_replicas: int = Field(default=1, ge=0)
    """Number of replicas without load. 0 gives everything back, and the first request waits for a replica."""
    max_replicas: int = Field(default=1, ge=1)
    """Largest number of replicas."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Largest number of requests in progress at one replica."""
    target_ongoing_requests: float | None = Field(default=None, gt=0)
    """Of the ingress: number of requests per replica that autoscaling aims at. None: a tenth of
    `max_ongoing_requests`, since a request keeps its replica busy for as long as its answer streams."""
    target_samples: float | None = Field(default=None, gt=0)
    """Of a pool of engines: number of samples per replica that autoscaling aims at, whatever requests they belong to.
    None: 70 % of what its engine writes at once."""
    upscale_delay_s: float = Field(default=30, ge=0)
    """Seconds of load above the target before replicas are added."""
    downscale_delay_s: float = Field(default=600, ge=0)
    """Seconds of load below the target before replicas are removed, down to `min_replicas`. A replica that is removed
    gives its GPU back, and the next one loads the model again."""
    num_cpus: float = Field(default=1, ge=0)
    """Number of CPUs per replica."""
    num_gpus: float | None = Field(default=None, ge=0)
    """Number of GPUs per replica. None: as many as its engine uses where the cluster has GPUs, else 0."""
    accelerator_type: str | None = None
    """Ray's label of the accelerator, such as `H100`."""


class ProposerPoolConfig(Strict):
    """One of several models that write proposals."""

    name: str = Field(pattern="^[A-Za-z0-9-]{1,40}$")
    """Name of the pool: its deployment is called `Proposer-<name>`."""
    engine: EngineConfig
    """The model."""
    share: float = Field(default=1, gt=0)
    """Its share of the K proposals, relative to the shares of the other pools."""
    replicas: ReplicaConfig = ReplicaConfig()
    """Its replicas."""


class KeyLimits(Strict):
    """Limits of one API key. None: no limit."""

    max_requests: int | None = Field(default=None, ge=1)
    """Largest number of concurrent requests."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Largest cost of all concurrent requests: the most tokens that their plans may read and write."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens per minute. A request reserves its cost when it starts, and is charged what it used when it ends."""


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
    """Largest cost of all concurrent requests: the most tokens that their plans may read and write."""
    per_key: KeyLimits = KeyLimits()
    """Limits of every key that sets none of its own."""


class TracesConfig(Strict):
    """OpenTelemetry traces of requests, sent to a collector by OTLP over HTTP."""

    endpoint: str = Field(pattern="^https?://[^/?#]+(/[^?#]*)?$")
    """Base URL of the collector, such as `http://collector:4318`; `/v1/traces` is added. Headers that hold a key come
    from the environment variable `OTEL_EXPORTER_OTLP_HEADERS` of the replicas."""
    service_name: str = "aft_ray"
    """Name of this server in the traces."""
    sample_ratio: float = Field(default=1, ge=0, le=1)
    """Share of the requests that are traced, where the client's `traceparent` does not say whether to."""


class ServingConfig(Strict):
    """The endpoint: ingress -> aggregator replicas -> proposer replicas."""

    engine: EngineConfig | None = None
    """Engine of the replicas. None: the run's `engine`."""
    proposer_engine: EngineConfig | None = None
    """`split` only: engine of the proposers. None: the same as `engine`."""
    proposers: tuple[ProposerPoolConfig, ...] = ()
    """`split` only: several models that each write their share of the proposals, without adapters. They replace
    `proposer_engine` and `proposer`. The model with the largest share writes single samples (L=0)."""
    adapters: dict[str, str] | None = None
    """Adapters by model name, each served in addition to the base model: folders, URLs, or `OWNER/NAME#REVISION` of the
    hub. None: the run's trained adapters."""
    proposer_adapter: str | None = None
    """`split` only: name of the adapter that writes the proposals of all requests. None: the adapter of the request."""
    default_model: str | None = None
    """Model that answers requests that name none. None: the last adapter, else the base model."""
    listed_plans: tuple[Annotated[str, Field(pattern=r"^(k\d{1,4}-l\d{1,4}|single)$")], ...] = ()
    """Plans that `/v1/models` lists with every model, such as `k5-l2` and `single`, for clients that offer a choice."""
    base_name: str = "base"
    """Model name of the base model."""
    topology: Literal["shared", "split"] = "shared"
    """`shared`: the aggregators write the proposals too. `split`: proposers have a pool of their own."""
    plan: PlanField = Plan()
    """Plan of requests that ask for none."""
    templates: TemplatesConfig = TemplatesConfig()
    """The templates; a run's own are `templates` of the run."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on. 0: any free port."""
    route_prefix: str | None = Field(default="/", pattern="^/")
    """Path of the application, where a cluster serves several. None: no HTTP, only callers within the cluster."""
    ingress: ReplicaConfig = ReplicaConfig(num_cpus=0.1, max_ongoing_requests=1000)
    """The replicas that receive HTTP requests."""
    aggregator: ReplicaConfig = ReplicaConfig()
    """The aggregator replicas. With `topology: shared` they are the only pool of engines."""
    proposer: ReplicaConfig = ReplicaConfig()
    """`split` only."""
    max_num_proposals: int = Field(default=16, ge=1)
    """Largest K that a request may ask for."""
    max_num_layers: int = Field(default=4, ge=0)
    """Largest L that a request may ask for."""
    max_tokens: int = Field(default=4096, ge=1)
    """Largest max_tokens that a request may ask for."""
    excess_max_tokens: Literal["reject", "clamp"] = "reject"
    """What happens to a `max_tokens` above `max_tokens` or above what the prompt leaves of the window: the request is
    refused, or its `max_tokens` is lowered to what fits, but never below the default plan's."""
    unknown_fields: Literal["reject", "ignore"] = "reject"
    """What happens to fields of a request that this server does not know, or that its engines do not honour where they
    only tune how an answer is sampled: the request is refused, or the header `x-aft-ignored` names them."""
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
    """Limits on concurrent requests and tokens."""
    adapters_dir: str | None = None
    """Folder of adapters, each in a subfolder named after its model; a path or a URL (`s3://`, `gs://`). New and
    changed ones are served in seconds."""
    keep_adapter_versions: int | None = Field(default=None, ge=1)
    """Number of copies of adapters (`.versions`) to keep in a folder: the newest ones, besides those in use. Leave it
    out if several applications share that folder. None: all."""
    usage: Literal["all_calls", "last_call"] = "all_calls"
    """What the standard fields of a reply's `usage` count: the calls of all layers, or the last one alone, for clients
    that treat them as the size of their conversation. `usage.aft` always has all of them."""
    ledger: str | None = None
    """Folder for one JSON line per request: key, plan, outcome, tokens by layer. It never holds a prompt."""
    traces: TracesConfig | None = None
    """Where to send traces. None: the server makes no traces."""
    stream_interval_s: float = Field(default=0.02, ge=0)
    """Tokens that follow each other within this time are sent together. The first token of an answer never waits."""

    @property
    def pools(self) -> list[tuple[str, EngineConfig | None, ReplicaConfig]]:
        """The pools of engine replicas: the key of their replicas, the engine (None: the run's), the replicas."""
        if self.topology == "shared":
            return [("aggregator", self.engine, self.aggregator)]
        aggregators = ("aggregator", self.engine, self.aggregator)
        if self.proposers:
            return [
                aggregators,
                *((f"proposers.{p.name}.replicas", p.engine, p.replicas) for p in self.proposers),
            ]
        return [aggregators, ("proposer", self.proposer_engine or self.engine, self.proposer)]

    def samples_per_request(self, pool: str) -> int:
        """Return the most samples that one request of the default plan asks of a pool at once."""
        plan = self.plan
        writes_drafts = self.topology == "shared" or pool != "aggregator"
        num_layers = plan.num_layers if pool == "aggregator" else min(plan.num_layers, 1)
        return plan.num_proposals if num_layers > (0 if writes_drafts else 1) else 1

    @property
    def proposers_take_adapters(self) -> bool:
        """Whether proposers write with the request's adapter, which does not fit proposers on models of their own."""
        has_own_model = self.proposer_engine is not None or bool(self.proposers)
        return self.topology == "shared" or not has_own_model
