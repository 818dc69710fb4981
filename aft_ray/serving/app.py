"""The Serve application: which deployments there are, how each scales, and starting them.

    shared   Ingress -> Engine                     one pool writes proposals and aggregations
    split    Ingress -> Proposer, Aggregator       two pools, scaled separately, with models of their own if wanted;
                                                   several models that draft have one pool each: Proposer-<name>

A Serve YAML names `build_app` (`import_path: aft_ray.serving:build_app`, `args:` = the fields of `ServingConfig`);
`serve_app` starts the same application from Python.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from aft_ray.config import EngineConfig, ReplicaConfig, ServingConfig, validate
from aft_ray.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.config import DeploymentActorConfig
    from ray.serve.schema import LoggingConfig

    from aft_ray.serving.handle_engine import HandleEngine

APP_NAME = "aft_ray"


def build_app(args: dict[str, Any]) -> Application:
    """Return the application for `args`, the fields of `ServingConfig`; `engine` is required."""
    return application(validate(ServingConfig, args, origin="serving"))


def application(config: ServingConfig) -> Application:
    """Return the deployments of a config, bound to each other. Raises ConfigError before anything starts."""
    from ray import serve

    from aft_ray.serving.ingress import Ingress
    from aft_ray.serving.keys import key_digests, read_keys, refuse_open_server, requires_keys

    check_config(config)
    assert config.engine is not None
    digests = key_digests(config)
    if config.keys_file is not None:
        read_keys(config.keys_file)
    refuse_open_server(config.host, requires_keys(config))
    ingress = serve.deployment(name="Ingress", deployment_actors=[control_actor(config)], **scaling(config.ingress))(
        serve.ingress()(Ingress)
    )
    pool = partial(engine_pool, stream_interval_s=config.stream_interval_s)
    adapters = config.adapters or {}
    if config.topology == "shared":
        return ingress.bind(config, digests, pool("Engine", config.engine, config.proposer, adapters))
    aggregators = pool("Aggregator", config.engine, config.aggregator, adapters)
    if not config.proposers_take_adapters and config.proposer_adapter is None:
        adapters = {}
    if config.proposers:
        proposers = [pool(f"Proposer-{own.name}", own.engine, own.replicas, adapters) for own in config.proposers]
    else:
        proposers = [pool("Proposer", config.proposer_engine or config.engine, config.proposer, adapters)]
    return ingress.bind(config, digests, aggregators, *proposers)


def control_actor(config: ServingConfig) -> DeploymentActorConfig:
    """Return the one actor that all ingress replicas ask. Serve keeps it alive as long as the deployment."""
    import ray
    from ray.serve.config import DeploymentActorConfig

    from aft_ray.serving.control import Control
    from aft_ray.serving.gate import ACTOR

    return DeploymentActorConfig(
        name=ACTOR,
        actor_class=ray.remote(Control),
        init_args=(config.admission, config.adapters or {}),
        actor_options={"num_cpus": 0},
    )


def engine_pool(
    name: str, engine: EngineConfig, replicas: ReplicaConfig, adapters: Mapping[str, str], *, stream_interval_s: float
) -> Application:
    """Return a pool of replicas of one engine, with the adapters of its model."""
    from ray import serve

    from aft_ray.serving.replica import EngineReplica

    return serve.deployment(name=name, **scaling(replicas))(EngineReplica).bind(
        engine, adapters, name, stream_interval_s
    )


def scaling(replicas: ReplicaConfig) -> dict[str, Any]:
    """Return Serve's deployment options: resources, autoscaling, and a drain longer than the longest request."""
    from aft_ray.serving.openai_request import LONGEST_REQUEST_S
    from aft_ray.serving.replica import PROBE_TIMEOUT_S

    resources: dict[str, Any] = {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus}
    if replicas.accelerator_type is not None:
        resources["accelerator_type"] = replicas.accelerator_type
    return {
        "ray_actor_options": resources,
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "autoscaling_config": {
            "min_replicas": replicas.min_replicas,
            "initial_replicas": max(1, replicas.min_replicas),
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": replicas.max_ongoing_requests,
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
    """Check across fields: names must exist, and the default plan must be within the server's own limits."""
    from aft_ray.serving.http_errors import HttpError
    from aft_ray.serving.openai_request import check_limits, model_names

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
    pools = [pool.name for pool in config.proposers]
    if len(set(pools)) < len(pools):
        raise ConfigError(f"serving.proposers: two of them have the same name: {', '.join(pools)}")
    if config.proposers and (config.proposer_engine or config.proposer_adapter):
        raise ConfigError("serving.proposers replaces proposer_engine and proposer_adapter; leave those out")
    try:
        check_limits(config.plan, config)
    except HttpError as error:
        raise ConfigError(f"serving.plan: {error}") from None


def serve_app(config: ServingConfig, *, name: str = APP_NAME, route_prefix: str = "/") -> str:
    """Start serving and return the base URL (`openai` clients add `/v1`).

    Uses the Ray cluster that this process is connected to, or starts a local one. Port 0 takes any free port, or the
    port of the Serve instance that already runs. Raises ConfigError, or EngineError when a replica could not start.
    """
    import ray
    from ray import serve

    app = application(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not ray.is_initialized():
        give_http_time_to_start()
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    base_url = start_http(config.host, config.port) + route_prefix.rstrip("/")
    try:
        serve.run(app, name=name, route_prefix=route_prefix, logging_config=quiet_logs())
    except RuntimeError as error:
        reason = why_not_started(name) or str(error)
        stop(name)
        raise EngineError(f"the application did not start: {reason}") from None
    return base_url


def drain(name: str = APP_NAME, timeout_s: float | None = None) -> int:
    """Refuse new requests, wait for those under way, and return how many were left after `timeout_s`.

    None waits as long as a request may take. New requests get 503 with Retry-After, and `/ready` answers 503, so that a
    load balancer chooses another server.
    """
    from ray import serve

    from aft_ray.serving.openai_request import LONGEST_REQUEST_S

    ingress = serve.get_deployment_handle("Ingress", app_name=name)
    ingress.drain.remote().result(timeout_s=60)
    give_up = time.monotonic() + (LONGEST_REQUEST_S if timeout_s is None else timeout_s)
    while num_open := int(ingress.num_open.remote().result(timeout_s=60)):
        if time.monotonic() > give_up:
            break
        time.sleep(0.25)
    return num_open


async def served_engine(config: ServingConfig, name: str = APP_NAME) -> HandleEngine:
    """Return the engine that writes the final answers of a running application, which can score texts (HTTP cannot)."""
    from ray import serve

    from aft_ray.serving.handle_engine import HandleEngine

    deployment = "Engine" if config.topology == "shared" else "Aggregator"
    return await HandleEngine.connect(serve.get_deployment_handle(deployment, app_name=name))


def why_not_started(name: str) -> str:
    """Return what the replicas raised: the last line of each traceback that Serve keeps."""
    from ray import serve

    deployments = serve.status().applications[name].deployments
    lines = [
        f"{key}: {deployment.message.strip().splitlines()[-1]}"
        for key, deployment in deployments.items()
        if deployment.status == "DEPLOY_FAILED" and deployment.message.strip()
    ]
    return "; ".join(lines)


def give_http_time_to_start() -> None:
    """Give Serve's HTTP server 30 s to become ready; Serve kills it after five, too few on a busy machine.

    Call it before the cluster starts: its processes inherit the variable.
    """
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")


def start_http(host: str, port: int) -> str:
    """Start Serve's HTTP server on the head node, or use the one that already runs there. Return its URL."""
    from ray import serve
    from ray.serve.context import _get_global_client

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        port = port or free_port(host)
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet_logs())
        return f"http://{reachable(host)}:{port}"
    found = running.http_config
    if found.host != host or port not in (0, found.port):
        raise ConfigError(
            f"serving.port: Serve already listens on {found.host}:{found.port} in this cluster, which is not "
            f"{host}:{port}, and one cluster has one HTTP address. Stop that instance (`serve shutdown`), or set "
            "serving.host and serving.port to its address"
        )
    return f"http://{reachable(host)}:{found.port}"


def free_port(host: str) -> int:
    """Return a port that is free now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """Return the host as a client on this machine writes it in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def stop(name: str = APP_NAME) -> None:
    """Stop the application. With the last application, Serve and its HTTP server stop too."""
    from ray import serve

    others = [app for app in serve.status().applications if app != name]
    if others:
        serve.delete(name)
        return
    with contextlib.redirect_stdout(io.StringIO()):  # Ray prints that the controller died, which is intended
        serve.shutdown()
