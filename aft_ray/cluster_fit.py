"""Checks that the cluster has, or can add, a node that holds a worker. What no node can hold would wait for ever.

    check_fits("targets.placement", {"CPU": 1, "GPU": 4})
    ConfigError: targets.placement requests 1 CPU, 4 GPU per worker, and no node has that. The nodes have: 8 CPU.
                 Nodes that can be added: 16 CPU, 1 GPU, L40S (up to 8). Request less or use a larger cluster

An autoscaling cluster is judged by its node types. Ray does not publish them, so they are read where the autoscaler
reads them: in the file that its process on the head node was started with. Where there is no such process (KubeRay runs
it in another container), the resource `aft_autoscaling` of any node says that nodes of unknown size can be added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft_ray.errors import ConfigError

ACCELERATOR = "accelerator_type:"
"""Prefix of the resource by which Ray marks the nodes of one kind of GPU: `accelerator_type:H100`."""
AUTOSCALING = "aft_autoscaling"
"""Resource of a node in a cluster whose nodes come when they are asked for."""
HEAD = "node:__internal_head__"
TIMEOUT_S = 60.0
ANY_NUMBER = 1_000_000
"""Number of workers that a node holds which ask for nothing."""


@dataclass(frozen=True, kw_only=True)
class NodeType:
    """A kind of node that the autoscaler can start."""

    name: str
    resources: Mapping[str, float]
    """Empty where the autoscaler itself learns them only from the first node."""
    max_nodes: int


def resources_of_worker(num_cpus: float, num_gpus: float, accelerator_type: str | None) -> dict[str, float]:
    """Return what Ray asks of a node for one worker."""
    wanted = {"CPU": num_cpus, "GPU": num_gpus}
    if accelerator_type is not None:
        wanted[f"{ACCELERATOR}{accelerator_type}"] = 0.001  # what Ray asks of the mark
    return wanted


def check_fits(what: str, wanted: Mapping[str, float], num_workers: int = 1) -> None:
    """Raise ConfigError when the cluster can never hold `num_workers` workers of `wanted` resources at a time.

    `what` names the setting that asks for them. Ray must be connected. Resources that others use now are not
    considered, since they come free.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    now = sum(num_held(has, wanted) for has in nodes)
    if now >= num_workers:
        return
    types = node_types()
    if types is None and any(has.get(AUTOSCALING) for has in nodes):
        return
    later = _num_held_later(nodes, types or (), wanted)
    if max(now, later) >= num_workers:
        return
    asked = f"{what} requests {shown(wanted)} per worker"
    if max(now, later):
        problem = f"{asked} for {num_workers} workers at a time, and the cluster holds {max(now, later)}"
    else:
        problem = f"{asked}, and no node has that"
    raise ConfigError(f"{problem}. {_shown_cluster(nodes, types)}. Request less or use a larger cluster")


def num_held(has: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """Return how many workers a node holds."""
    asked = {name: amount for name, amount in wanted.items() if amount}
    return min((int(has.get(name, 0) / amount + 1e-9) for name, amount in asked.items()), default=ANY_NUMBER)


def _num_held_later(
    nodes: Sequence[Mapping[str, float]], types: Sequence[NodeType], wanted: Mapping[str, float]
) -> int:
    """Return how many workers the cluster holds when the autoscaler has started all nodes that it may."""
    total = sum(num_held(has, wanted) for has in nodes if has.get(HEAD))
    for kind in types:
        total += kind.max_nodes * (num_held(kind.resources, wanted) if kind.resources else ANY_NUMBER)
    return total


def node_types() -> list[NodeType] | None:
    """Return the kinds of nodes that the autoscaler can start, or None where its settings cannot be found."""
    import ray

    on_head: dict[str, Any] = {"num_cpus": 0, "resources": {HEAD: 0.001}}
    try:
        found = ray.remote(**on_head)(types_of_this_head).remote(ray.get_runtime_context().gcs_address)
        return ray.get(found, timeout=TIMEOUT_S)
    except ray.exceptions.RayError:  # the head takes no work, or cannot import this package
        return None


def types_of_this_head(gcs_address: str) -> list[NodeType] | None:
    """Return the node types of this cluster's autoscaler, which runs on this machine, or None without one."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        options = dict(word.split("=", 1) for word in process.info["cmdline"] or [] if "=" in word)
        config = options.get("--autoscaling-config")
        if config and options.get("--gcs-address") == gcs_address:
            return read_types(Path(config).expanduser())
    return None


def read_types(config: Path) -> list[NodeType] | None:
    """Read the node types from the configuration of an autoscaler; None if it cannot be read."""
    import yaml

    try:
        settings = yaml.safe_load(config.read_text())
        types, most = settings["available_node_types"], settings.get("max_workers", 2)
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    found = []
    for name, kind in types.items():
        # The head's own type starts no further nodes unless it says so.
        limit = kind.get("max_workers", 0 if name == settings.get("head_node_type") else most)
        if limit:
            found.append(NodeType(name=name, resources=kind.get("resources") or {}, max_nodes=min(limit, most)))
    return found


def shown(resources: Mapping[str, float]) -> str:
    """Return resources in words: `4 CPU, 2 GPU, H100`."""
    amounts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    marks = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
    return ", ".join([*amounts, *marks]) or "nothing"


def _shown_cluster(nodes: Sequence[Mapping[str, float]], types: Sequence[NodeType] | None) -> str:
    text = f"The nodes have: {'; '.join(sorted(map(shown, nodes)))}"
    if types is not None:
        kinds = [f"{shown(kind.resources)} (up to {kind.max_nodes})" for kind in types]
        text += f". Nodes that can be added: {'; '.join(kinds) or 'none'}"
    return text
