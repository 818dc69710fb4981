"""`aft-ray doctor`: what a run needs, and what of it is not there. One line for each, with what to do.

aft-ray doctor                                  this machine: versions, GPUs, disk, open ports
aft-ray doctor --config C                       and the run: settings, storage, the workers of each step, models, keys
aft-ray doctor --config C --address http://...  the same by a job on that cluster, with every node of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlparse

from aft_ray.config import Config, load_config
from aft_ray.errors import AftError, ConfigError
from aft_ray.pipeline.findings import Finding, note, ok, problem

REACH_TIMEOUT_S = 180.0
DOCTOR = ("python", "-m", "aft_ray", "doctor")


def checkup(config_file: str | None, overrides: Sequence[str], address: str | None) -> int:
    """Print what was found. Returns 0 without problems, else 2."""
    from aft_ray.pipeline.machine import machine_findings

    config = load_config(config_file, overrides) if config_file is not None else None
    num_problems = _print("this machine", machine_findings())
    if config is not None:
        num_problems += _print("the run's settings", settings_findings(config))
    if address is not None:
        num_problems += _print(f"the job server {address}", server_findings(address, has_config=config is not None))
    if config is not None and address is None:
        num_problems += _print("the cluster", cluster_findings(config))
    elif config is not None and config_file is not None and address is not None and not num_problems:
        from aft_ray.pipeline.submitting import send

        return send(DOCTOR, "doctor", [config_file], [config], overrides, address, wait=True)
    print(f"problems found: {num_problems}" if num_problems else "no problems found")
    return 2 if num_problems else 0


def _print(title: str, findings: Sequence[Finding] | Iterator[Finding]) -> int:
    """Print a section, and return the number of its problems."""
    print(f"── {title}", flush=True)
    num_problems = 0
    for finding in findings:
        print(finding, flush=True)
        num_problems += finding.kind == "problem"
    return num_problems


def settings_findings(config: Config) -> Iterator[Finding]:
    """Yield what this machine knows of the settings: packages, templates, models, variables, the run's place."""
    from aft_ray.pipeline.checks import CONDITIONS
    from aft_ray.pipeline.environment import read_environment
    from aft_ray.storage import check_writable

    for condition in CONDITIONS:
        yield from _tried(partial(condition, config), (condition.__doc__ or "").split("\n")[0])
    yield from _tried(partial(check_writable, config.run.dir), f"run.dir {config.run.dir} can be written from here")
    yield from _tried(partial(read_environment, config), "The variables of run.environment are set here")


def _tried(check: Callable[[], object], what: str) -> Iterator[Finding]:
    try:
        check()
    except AftError as error:
        yield problem(str(error))
    else:
        yield ok(what.rstrip("."))


def server_findings(address: str, has_config: bool) -> Iterator[Finding]:
    """Yield what a job server says of its cluster."""
    import ray

    from aft_ray.pipeline.job_server import JobServer

    try:
        server = JobServer.at(address)
        version, wants_token = server.ray_version(), server.wants_token()
    except AftError as error:
        yield problem(str(error))
        return
    if version == ray.__version__:
        yield ok(f"ray {version}, as here")
    else:
        yield problem(f"ray {version}, and here {ray.__version__}", "Install the same version on both sides")
    if wants_token:
        yield ok("it requires a token, and accepts the one on this machine")
    else:
        yield problem(
            "it requires no token: whoever reaches the cluster's ports can run code on it",
            "Start Ray with RAY_AUTH_MODE=token on every node",
        )
    parts = urlparse(address)
    if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        yield note(f"{parts.hostname} is reached by http, so the token travels unencrypted", "Use ssh -L, or TLS")
    if not has_config:
        yield note("its nodes were not looked at", "Give --config, too")


def cluster_findings(config: Config) -> Iterator[Finding]:
    """Yield what the cluster of the run has: its nodes, room for the workers of each step, models and keys."""
    import ray

    from aft_ray.pipeline.cluster import RaySession
    from aft_ray.pipeline.reach import reach_all

    with RaySession(config) as session:
        try:
            session.connect()
        except AftError as error:
            yield problem(str(error))
        if not ray.is_initialized():
            return
        yield from _nodes(is_local=session.address == "local")
        yield from _room(config)
        look: dict[str, Any] = {"num_cpus": 0}
        try:
            yield from ray.get(ray.remote(**look)(reach_all).remote(config), timeout=REACH_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            yield problem(f"models, data sets and endpoints could not be looked up by a worker: {type(error).__name__}")


def _nodes(is_local: bool) -> Iterator[Finding]:
    """Yield every node with what it has, and what is wrong on it."""
    import ray

    from aft_ray.cluster_fit import shown
    from aft_ray.pipeline.environment import ask_nodes
    from aft_ray.pipeline.machine import machine_findings

    alive = [node for node in ray.nodes() if node["Alive"]]
    for node in alive:
        yield ok(f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {shown(node['Resources'])}")
    if is_local:
        return  # this machine, which has been looked at
    answers = ask_nodes(machine_findings)
    for host, found in answers.items():
        if isinstance(found, Exception):
            yield problem(f"node {host} cannot run this package: {found!r}", "Install the same versions there")
            continue
        for finding in found:
            if finding.kind != "ok":
                yield Finding(kind=finding.kind, text=f"node {host}: {finding.text}", remedy=finding.remedy)
    if len(answers) < len(alive):
        yield problem(
            f"{len(alive) - len(answers)} nodes did not answer", "See ray status and the logs of their raylets"
        )


def _room(config: Config) -> Iterator[Finding]:
    """Yield for every step whether its workers fit, on this cluster or on nodes that it can add."""
    from aft_ray.cluster_fit import check_fits, resources_of_worker, shown
    from aft_ray.gpus import num_gpus_of
    from aft_ray.pipeline.needs import needs

    for need in needs(config):
        num_gpus = num_gpus_of(need.num_gpus, need.engine_gpus)
        wanted = resources_of_worker(need.num_cpus, num_gpus, need.accelerator_type)
        try:
            check_fits(need.key, wanted, need.least)
        except ConfigError as error:
            yield problem(str(error))
        else:
            workers = f"{need.most} workers" if need.most > 1 else "1 worker"
            yield ok(f"{need.step}: {workers} of {shown(wanted)} ({need.key})")
