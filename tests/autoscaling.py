"""A Ray cluster on one host whose workers, with pretended GPUs, come when they are asked for and go when they are idle.

    with hosts(1) as cluster:
        start_autoscaling_ray(cluster, num_gpus=1, max_workers=3)
        cluster.run(0, [...])          # a driver, which may `lose` a node as a spot instance is lost

`ray.cluster_utils.AutoscalingCluster` would do the same, but reads an example.yaml that the wheel of Ray 2.60 lacks.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from tests.hosts import PORT, QUICK, Hosts

OBJECT_STORE = 100_000_000
EMPTY = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
EMPTY += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude")


def start_autoscaling_ray(
    cluster: Hosts,
    *,
    num_gpus: float = 1,
    num_cpus: float = 2,
    accelerator: str = "L40S",
    max_workers: int = 3,
    idle_minutes: float = 0.2,
) -> None:
    """Start a head without CPUs on host 0, and an autoscaler that adds up to `max_workers` nodes of one type to it."""
    mark = {f"accelerator_type:{accelerator}": 1}
    worker = {"CPU": num_cpus, "GPU": num_gpus, **mark, "object_store_memory": OBJECT_STORE}
    head = {"CPU": 0, "object_store_memory": OBJECT_STORE}
    settings = {
        "cluster_name": "pretended",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": idle_minutes,
        "provider": {
            "type": "fake_multinode",
            "launch_multiple": True,  # as clouds do
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": head, "node_config": {}, "max_workers": 0},
            "gpu_worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": max_workers},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "rsync_filter": [],
        **{name: [] for name in EMPTY},
    }
    config = cluster.folder / "autoscaling.json"
    config.write_text(json.dumps(settings))
    address = cluster.address(0)
    command = ["ray", "start", "--head", "--block", f"--port={PORT}", f"--node-ip-address={address}", "--num-cpus=0"]
    command += ["--dashboard-host=127.0.0.1", f"--object-store-memory={OBJECT_STORE}", "--disable-usage-stats"]
    command.append(f"--autoscaling-config={config}")
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", **QUICK}
    cluster.start(0, command, log=cluster.folder / "ray-0.log", env=fake)
    cluster.ray_address = f"{address}:{PORT}"
    cluster.wait_for_nodes(1)


# ── for drivers on the host ───────────────────────────────────────────────────────────────────────────────────────────


def workers() -> list[dict[str, Any]]:
    """Return the cluster's living nodes but for the head, which has no CPU."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def lose(node: Mapping[str, Any]) -> None:
    """Kill a node and all that runs on it at once."""
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and f"--raylet_socket_name={node['RayletSocketName']}" in process.info["cmdline"]:
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            return
    raise AssertionError(f"no raylet of node {node['NodeID']}")


def wait(condition: Callable[[], bool], seconds: float = 240) -> float:
    """Wait for a condition and return the seconds that it took; after `seconds`, AssertionError."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, f"not within {seconds} s; {len(workers())} workers"
        time.sleep(0.1)
    return time.monotonic() - began
