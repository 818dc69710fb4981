"""Starting, draining and ending an application, on the Serve instance of a cluster or on a new one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from aft_ray.cluster_fit import check_fits, resources_of_worker
from aft_ray.config import ServingConfig, gpus_of
from aft_ray.errors import ConfigError, EngineError
from aft_ray.gpus import num_gpus_of
from aft_ray.serving.deployments import application, check_config, quiet_logs

if TYPE_CHECKING:
    from aft_ray.serving.handle_engine import HandleEngine

logger = logging.getLogger("ray.serve.aft_ray")

APP_NAME = "aft_ray"
"""Name of an application that belongs to no run."""
RECOVER_S = 1800.0
"""How long an application may take to start after it lost a process: a large model is loaded again."""
ASK_S, TRY_S = 60.0, 10.0
"""How long a draining server may take to answer a question, and one replica, which may be on a host that is gone."""


def serve_app(config: ServingConfig, *, name: str = APP_NAME, replace_abandoned: bool = False) -> str:
    """Start serving and return the base URL (`openai` clients add `/v1`).

    Uses the Ray cluster that this process is connected to, or starts a local one. Port 0 takes any free port, or the
    port of the Serve instance that already runs. With `route_prefix: null` no HTTP server is started or used, and the
    URL is for clients of a `ServeTransport`. With `replace_abandoned`, an application of this name whose process was
    killed before it could end it is replaced. Raises ConfigError when the name or the route is taken, or EngineError
    when a replica could not start.
    """
    import ray
    from ray import serve
    from ray.experimental.internal_kv import _internal_kv_put
    from ray.serve.exceptions import RayServeException

    check_config(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not ray.is_initialized():
        prepare_for_serving()
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    check_replicas_fit(config)
    app = application(config)  # what it asks for follows from the cluster
    if config.route_prefix is None:
        start_without_http()
        base_url = f"http://{name}"
    else:
        base_url = start_http(config.host, config.port) + config.route_prefix.rstrip("/")
    if name in serve.status().applications:
        if not (replace_abandoned and is_abandoned(name)):
            raise ConfigError(
                f"an application named {name} is already served in this cluster. Stop it where it was started, or with "
                f"python -c \"import ray; from ray import serve; ray.init(); serve.delete('{name}')\""
            )
        serve.delete(name)
    _internal_kv_put(OWNER + name.encode(), ray.get_runtime_context().get_job_id().encode())
    try:
        try:
            serve.run(app, name=name, route_prefix=config.route_prefix, logging_config=quiet_logs())
        except RuntimeError:
            if not has_lost_a_process(name):
                raise
            await_recovery(name)
    except RayServeException as error:
        if "is being used by application" not in str(error):
            raise
        taken = str(error).partition("Prefix ")[2].partition(" Failed")[0]
        raise ConfigError(f"serving.route_prefix: {taken} Choose another path, such as /{name}") from None
    except RuntimeError as error:
        reason = why_not_started(name) or str(error)
        stop(name)
        raise EngineError(f"the application did not start: {reason}") from None
    return base_url


def has_lost_a_process(name: str) -> bool:
    """Whether an application that starts was called failed for nothing but a replica or an actor that was lost.

    Serve replaces what is lost, with its host for example, and goes on; but while an application starts, its status is
    "failed" until the deployment is healthy. By the time that this asks, all of them may be.
    """
    from ray import serve

    deployments = serve.status().applications[name].deployments.values()
    triggers = {deployment.status_trigger for deployment in deployments if deployment.status == "DEPLOY_FAILED"}
    return triggers <= {"HEALTH_CHECK_FAILED"}


def await_recovery(name: str) -> None:
    """Wait until an application that lost a process has started. Raises RuntimeError where it does not."""
    from ray import serve
    from ray.serve.context import _get_global_client

    logger.warning("%s: a process was lost while the application started; Serve starts another one", name)
    give_up = time.monotonic() + RECOVER_S
    while serve.status().applications[name].status != "RUNNING":
        if not has_lost_a_process(name) or time.monotonic() > give_up:
            raise RuntimeError("a process was lost while it started, and it did not recover")
        time.sleep(1)
    client = _get_global_client()
    assert client is not None  # it raises where Serve does not run
    client.wait_for_proxies_serving()


def check_replicas_fit(config: ServingConfig) -> None:
    """Raise ConfigError for a replica that no node of the connected cluster can ever hold: Serve would wait for it."""
    for key, engine, replicas in config.pools:
        num_gpus = num_gpus_of(replicas.num_gpus, gpus_of(engine) if engine is not None else 0)
        check_fits(f"serving.{key}", resources_of_worker(replicas.num_cpus, num_gpus, replicas.accelerator_type))


def drain(name: str = APP_NAME, timeout_s: float | None = None) -> int:
    """Refuse new requests, wait for those under way, and return how many were left after `timeout_s`.

    None waits as long as a request may take. New requests get 503 with Retry-After, and `/ready` answers 503, so that a
    load balancer chooses another server.
    """

    from aft_ray.serving.openai.request import LONGEST_REQUEST_S

    longest_s = LONGEST_REQUEST_S if timeout_s is None else timeout_s
    # a handle may share its caller's loop (RAY_SERVE_THROUGHPUT_OPTIMIZED), and needs it until Serve has shut down
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return asyncio.run_coroutine_threadsafe(_drain(name, longest_s), loop).result()


async def _drain(name: str, timeout_s: float) -> int:
    from ray import serve

    ingress = serve.get_deployment_handle("Ingress", app_name=name)
    await _ask(ingress.drain)
    give_up = time.monotonic() + timeout_s
    while num_open := int(await _ask(ingress.num_open)):
        if time.monotonic() > give_up:
            break
        await asyncio.sleep(0.25)
    return num_open


async def _ask(method: Any) -> Any:
    """Call a method of the ingress, and again where the replica that took the call is lost or does not answer."""
    from ray.exceptions import RayActorError

    give_up = time.monotonic() + ASK_S
    while True:
        try:
            async with asyncio.timeout(TRY_S):
                return await method.remote()
        except (RayActorError, TimeoutError):
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(0.25)


async def served_engine(name: str = APP_NAME) -> HandleEngine:
    """Return the engine that writes the final answers of a running application, which can score texts (HTTP cannot)."""
    from ray import serve

    from aft_ray.serving.handle_engine import HandleEngine

    return await HandleEngine.connect(serve.get_deployment_handle("Aggregator", app_name=name))


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


def prepare_for_serving() -> None:
    """Set how Serve works in a cluster that this process starts, unless the user has set it.

    Calls between deployments go over gRPC, which is faster than Ray's own calls (docs/operations.md). Serve's HTTP
    server gets 30 s to become ready; it is killed after five, too few on a busy machine. Call it before Ray is imported
    and the cluster starts: its processes inherit the variables.
    """
    os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")


def is_abandoned(name: str) -> bool:
    """Whether the process that started an application is gone. An application without a known process is not."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    owner = (_internal_kv_get(OWNER + name.encode()) or b"").decode()
    return any(job["JobID"] == owner and job["IsDead"] for job in ray._private.state.jobs())


OWNER = b"aft_ray.owner/"
"""Beginning of the keys, in the cluster's key-value store, of the Ray jobs that started applications."""


class _Started:
    """Whether this process started the Serve instance. Only who started it ends it."""

    here = False


def start_without_http() -> None:
    """Start Serve without an HTTP server, or use the instance that already runs in the cluster."""
    from ray import serve
    from ray.serve.context import _get_global_client

    if _get_global_client(raise_if_no_controller_running=False) is None:
        serve.start(proxy_location="Disabled", logging_config=quiet_logs())
        _Started.here = True


def start_http(host: str, port: int) -> str:
    """Start Serve's HTTP server on the head node, or use the one that already runs there. Return its URL."""
    from ray import serve
    from ray.serve.context import _get_global_client

    running = _get_global_client(raise_if_no_controller_running=False)
    if running is None:
        port = free_port(host, port)
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet_logs())
        _Started.here = True
        return f"http://{reachable(host)}:{port}"
    found = running.http_config
    status = serve.status()
    if not status.proxies and not status.applications:
        serve.shutdown()  # an evaluation that was killed left it, without an HTTP server
        return start_http(host, port)
    if not status.proxies:
        raise ConfigError(
            "Serve runs without an HTTP server in this cluster, as an evaluation starts it. Serve again when the "
            "evaluation has ended"
        )
    if found.host != host or port not in (0, found.port):
        raise ConfigError(
            f"serving.port: Serve already listens on {found.host}:{found.port} in this cluster, which is not "
            f"{host}:{port}, and one cluster has one HTTP address. Stop that instance (`serve shutdown`), or set "
            "serving.host and serving.port to its address"
        )
    return f"http://{reachable(host)}:{found.port}"


def free_port(host: str, port: int = 0) -> int:
    """Return the port, or a free one for 0. Raises ConfigError where another process listens on it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was closed a moment ago is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"serving.port: cannot listen on {host}:{port}: {error.strerror}. Choose another port; 0 takes any"
            ) from None
        return int(probe.getsockname()[1])


def reachable(host: str) -> str:
    """Return the host as a client on this machine writes it in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def stop(name: str = APP_NAME) -> None:
    """End the application, and with the last one the Serve instance, if this process started it.

    Replicas on hosts that are lost cannot say that they have ended: after a minute they are left to Serve.
    """
    from ray import serve
    from ray.serve.context import _get_global_client

    if _get_global_client(raise_if_no_controller_running=False) is None:
        return
    try:
        serve.delete(name)
    except TimeoutError:
        logger.warning("%s: replicas that do not answer are left to Serve, which goes on ending them", name)
        return
    if _Started.here and not serve.status().applications:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray prints that the controller died, which is intended
            serve.shutdown()
        _Started.here = False
