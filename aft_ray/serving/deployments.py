"""The Serve application: which deployments there are, what each holds handles to, and how each scales.

    shared   Ingress -> Aggregator                one pool writes proposals and aggregations
    split    Ingress -> Aggregator -> Proposer    two pools, scaled separately, with models of their own if wanted;
                                                  several models that draft have one pool each: Proposer-<name>

A Serve YAML names `build_app` (`import_path: aft_ray.serving:build_app`, `args:` = the fields of `ServingConfig`);
`app.serve_app` starts the same application from Python.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aft_ray.config import (
    EngineConfig,
    ReplicaConfig,
    ServingConfig,
    gpus_of,
    samples_at_once,
    validate,
    why_not_on_gpus,
)
from aft_ray.errors import ConfigError, StorageError
from aft_ray.gpus import num_gpus_of

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.config import DeploymentActorConfig
    from ray.serve.schema import LoggingConfig

logger = logging.getLogger("ray.serve.aft_ray")

WATCHED_LORA_RANK = 16
"""Rank that engines are ready for besides that of the adapters they know, where `adapters_dir` may bring others."""


def build_app(args: dict[str, Any]) -> Application:
    """Return the application for `args`, the fields of `ServingConfig`; `engine` is required."""
    return application(content_named(validate(ServingConfig, args, origin="serving")))


def content_named(config: ServingConfig) -> ServingConfig:
    """Return the config with each adapter as the version that it is now (`adapters.keep_version`).

    A replica that starts later, or an engine that loads an adapter again, then finds the weights that the others have,
    whatever has been written to the adapter's own folder. Where no version can be kept, since that folder is read-only
    or not seen from here, the adapter is served from its own place, and a warning says so.
    """
    from aft_ray.serving.adapters import VERSIONS, keep_version
    from aft_ray.storage import Folder

    if config.adapters is None:
        return config
    store = None if config.adapters_dir is None else Folder.at(config.adapters_dir).child(VERSIONS)
    adapters = dict(config.adapters)
    for name, reference in config.adapters.items():
        try:
            adapters[name] = keep_version(reference, store).path
        except (ConfigError, StorageError) as error:
            logger.warning("serving.adapters.%s is served from its own place, which must not change: %s", name, error)
    return config.model_copy(update={"adapters": adapters})


def application(config: ServingConfig) -> Application:
    """Return the deployments of a config, bound to each other. Raises ConfigError before anything starts."""
    from ray import serve

    from aft_ray.serving.ingress import Ingress
    from aft_ray.serving.limits.keys import key_digests

    check_config(config)
    assert config.engine is not None
    digests = key_digests(config)
    ingress = serve.deployment(
        name="Ingress", deployment_actors=[control_actor(config)], **ingress_options(config.ingress)
    )(serve.ingress()(Ingress))
    return ingress.bind(config, digests, aggregator_pool(config))


def aggregator_pool(config: ServingConfig) -> Application:
    """Return the aggregators, bound to the proposer pools that they draw on."""
    from ray import serve

    from aft_ray.serving.aggregator_replica import AggregatorReplica

    assert config.engine is not None
    options = pool_options(config, "aggregator", config.engine, config.aggregator)
    deployment = serve.deployment(name="Aggregator", **options)
    return deployment(AggregatorReplica).bind(
        config.engine,
        config.adapters or {},
        *proposer_pools(config),
        template=config.templates.aggregator,
        shares=shares_of(config),
        proposers_take_adapters=config.proposers_take_adapters,
        stream_interval_s=config.stream_interval_s,
        least_lora_rank=least_lora_rank(config),
        traces=config.traces,
    )


def shares_of(config: ServingConfig) -> list[float]:
    """Return the share of the proposals that each proposer pool writes."""
    if config.topology == "shared":
        return []
    return [pool.share for pool in config.proposers] or [1.0]


def proposer_pools(config: ServingConfig) -> list[Application]:
    """Return the pools that only write proposals: none where the aggregators write them."""
    from ray import serve

    from aft_ray.serving.replica import EngineReplica

    if config.topology == "shared":
        return []
    takes_adapters = config.proposers_take_adapters or config.proposer_adapter is not None
    adapters = (config.adapters or {}) if takes_adapters else {}
    rank = least_lora_rank(config) if takes_adapters else 0
    assert config.engine is not None
    engine = config.proposer_engine or config.engine
    own = [(f"Proposer-{pool.name}", pool.engine, pool.replicas) for pool in config.proposers]
    return [
        serve.deployment(name=name, **pool_options(config, "proposer", engine, replicas))(EngineReplica).bind(
            engine, adapters, name, config.stream_interval_s, rank, config.traces
        )
        for name, engine, replicas in own or [("Proposer", engine, config.proposer)]
    ]


def least_lora_rank(config: ServingConfig) -> int:
    """Return the rank that engines must be ready for, whatever adapters they know when they start."""
    return WATCHED_LORA_RANK if config.adapters_dir is not None else 0


def control_actor(config: ServingConfig) -> DeploymentActorConfig:
    """Return the one actor that all ingress replicas ask. Serve keeps it alive as long as the deployment."""
    import ray
    from ray.serve.config import DeploymentActorConfig

    from aft_ray.serving.limits.control import Control
    from aft_ray.serving.limits.gate import ACTOR

    return DeploymentActorConfig(
        name=ACTOR,
        actor_class=ray.remote(Control),
        init_args=(config.admission, config.adapters or {}),
        actor_options={"num_cpus": 0},
    )


def ingress_options(replicas: ReplicaConfig) -> dict[str, Any]:
    """Return Serve's options of the ingress, which scales by its requests."""
    return deployment_options(replicas, {"target_ongoing_requests": ingress_target(replicas)})


def ingress_target(replicas: ReplicaConfig) -> float:
    """Return the requests per ingress replica that autoscaling aims at."""
    return replicas.target_ongoing_requests or max(1.0, replicas.max_ongoing_requests / 10)


def pool_options(config: ServingConfig, pool: str, engine: EngineConfig, replicas: ReplicaConfig) -> dict[str, Any]:
    """Return Serve's options of a pool of engines, which scales and takes requests by its samples."""
    from aft_ray.serving.routing import by_samples
    from aft_ray.serving.scaling import BySamples

    policy = {
        "policy_function": BySamples,
        "policy_kwargs": {
            "target_samples": target_samples(engine, replicas),
            "samples_per_request": config.samples_per_request(pool),
        },
    }
    options = deployment_options(replicas, {"policy": policy}, gpus=gpus_of(engine))
    return options | {"request_router_config": by_samples()}


def target_samples(engine: EngineConfig, replicas: ReplicaConfig) -> float:
    """Return the samples per replica that a pool aims at."""
    return replicas.target_samples or 0.7 * (samples_at_once(engine) or replicas.max_ongoing_requests)


def deployment_options(replicas: ReplicaConfig, scaling: Mapping[str, Any], gpus: int = 0) -> dict[str, Any]:
    """Return Serve's options of a deployment: resources, scaling, and a drain longer than the longest request.

    `gpus`: number of GPUs that the engine of a replica uses where the connected cluster has GPUs.
    """
    from aft_ray.serving.openai.request import LONGEST_REQUEST_S
    from aft_ray.serving.replica import PROBE_TIMEOUT_S

    resources: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": num_gpus_of(replicas.num_gpus, gpus)}
    if replicas.accelerator_type is not None:
        resources["accelerator_type"] = replicas.accelerator_type
    return {
        "ray_actor_options": resources,
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "autoscaling_config": {
            "min_replicas": replicas.min_replicas,
            "initial_replicas": max(1, replicas.min_replicas),
            "max_replicas": replicas.max_replicas,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            **scaling,
        },
        "graceful_shutdown_timeout_s": LONGEST_REQUEST_S + 30,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_timeout_s": PROBE_TIMEOUT_S + 15,
        "logging_config": quiet_logs(),
    }


def quiet_logs() -> LoggingConfig:
    """Return a log configuration without a line per request; warnings and errors are logged."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def check_config(config: ServingConfig) -> None:
    """Check across fields: names and keys must exist, and the default plan must be within the server's own limits."""
    from aft_ray.serving.errors import HttpError
    from aft_ray.serving.limits.keys import key_digests, read_keys, refuse_open_server, requires_keys
    from aft_ray.serving.openai.request import check_limits, model_names
    from aft_ray.serving.traces import check_traces

    if config.engine is None:
        raise ConfigError("serving.engine: missing; name the model to serve, such as {type: vllm, model: ...}")
    names = model_names(config)
    if len(set(names)) < len(names):
        raise ConfigError(f"serving.base_name: '{config.base_name}' is also the name of an adapter; rename one")
    if config.default_model not in (None, *names):
        raise ConfigError(f"serving.default_model: '{config.default_model}' is not one of the models {names}")
    if config.proposer_adapter not in (None, *names[1:]):
        raise ConfigError(
            f"serving.proposer_adapter: '{config.proposer_adapter}' is not one of the adapters {names[1:]}"
        )
    if config.topology == "shared" and (config.proposer_engine or config.proposer_adapter or config.proposers):
        raise ConfigError(
            "serving.topology: with shared, proposers cannot have an engine or adapter of their own; set split"
        )
    if config.topology == "shared" and config.proposer != ReplicaConfig():
        raise ConfigError(
            "serving.proposer: with topology shared there is one pool of replicas, serving.aggregator; rename it, or "
            "set split"
        )
    pools = [pool.name for pool in config.proposers]
    if len(set(pools)) < len(pools):
        raise ConfigError(f"serving.proposers: two of them have the same name: {', '.join(pools)}")
    if config.proposers and (config.proposer_engine or config.proposer_adapter):
        raise ConfigError("serving.proposers replaces proposer_engine and proposer_adapter; leave those out")
    for key, engine, replicas in config.pools:
        reason = None if engine is None else why_not_on_gpus(engine, replicas.num_gpus)
        if reason is not None:
            raise ConfigError(f"serving.{key}.num_gpus {replicas.num_gpus:g}, {reason}")
    check_adapters_dir(config)
    check_scaling(config)
    check_traces(config.traces)
    key_digests(config)
    if config.keys_file is not None:
        read_keys(config.keys_file)
    refuse_open_server(config.host, requires_keys(config))
    try:
        check_limits(config.plan, config)
    except HttpError as error:
        raise ConfigError(f"serving.plan: {error}") from None


def check_adapters_dir(config: ServingConfig) -> None:
    """Raise ConfigError for a place of adapters that cannot be watched, or whose versions nobody removes."""
    from aft_ray.storage import Folder

    if config.adapters_dir is None:
        return
    try:
        folder = Folder.at(config.adapters_dir)
    except ConfigError as error:
        raise ConfigError(f"serving.adapters_dir: {error}") from None
    if not folder.is_local and config.keep_adapter_versions is not None:
        raise ConfigError(
            f"serving.keep_adapter_versions {config.keep_adapter_versions}: versions are removed from file systems "
            f"only, and adapters_dir is {config.adapters_dir}. Leave one of the two out"
        )


def check_scaling(config: ServingConfig) -> None:
    """Raise ConfigError where a deployment could never reach its `max_replicas`.

    Admission refuses requests beyond `admission.max_requests`, so these must suffice to fill one replica less than
    `max_replicas`; and a replica must be allowed as many requests as fill it.
    """
    if config.ingress.target_samples is not None:
        raise ConfigError("serving.ingress.target_samples: the ingress writes none; set target_ongoing_requests")
    fills = [("ingress", config.ingress, 1, ingress_target(config.ingress))]
    for key, engine, replicas in config.pools:
        if replicas.target_ongoing_requests is not None:
            raise ConfigError(f"serving.{key}.target_ongoing_requests: engines scale by samples; set target_samples")
        if engine is not None:
            fills.append((key, replicas, config.samples_per_request(key), target_samples(engine, replicas)))
    for key, replicas, samples, target in fills:
        if replicas.max_replicas <= max(1, replicas.min_replicas):
            continue
        if replicas.max_ongoing_requests * samples < target:
            raise ConfigError(
                f"serving.{key}.max_ongoing_requests {replicas.max_ongoing_requests}: that many requests of {samples} "
                f"samples never reach the {target:g} at which a replica is added. Raise it, or lower the target"
            )
        needed = math.ceil(target * (replicas.max_replicas - 1) / samples)
        allowed = config.admission.max_requests
        if allowed is not None and allowed <= needed:
            raise ConfigError(
                f"serving.{key}.max_replicas {replicas.max_replicas}: it takes more than {needed} requests at once to "
                f"fill {replicas.max_replicas - 1} replicas, and admission.max_requests is {allowed}. Raise "
                "admission.max_requests, or lower max_replicas or the target"
            )
