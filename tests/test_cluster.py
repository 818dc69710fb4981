"""A stage on a cluster of several (simulated) nodes: it spreads, it survives the loss of a node, it gives GPUs back."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aft_ray.runs import read_manifest
from aft_ray.shards import Processed
from aft_ray.storage import Folder
from tests.hosts import QUICK
from tests.test_stages import Squarer, source

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent

DRIVER = """
import dataclasses, json, sys, threading, time
from functools import partial
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from aft_ray.config import PlacementConfig
from aft_ray.stages import run_stage
from tests.test_cluster import WhereItRuns
from tests.test_stages import squares

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    small = dict(object_store_memory=80_000_000, num_gpus=1)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=80_000_000))
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    placement = PlacementConfig(num_cpus=1, num_gpus=1, min_actors=1, max_actors=2, max_shards_in_flight=2)
    worker = partial(WhereItRuns, folder / "workers", 0.3)
    stage = dataclasses.replace(squares(folder), worker=worker, placement=placement)

    def lose() -> None:
        while len(stage.output.names(".parquet")) < 4:
            time.sleep(0.05)
        cluster.remove_node(nodes[1], allow_graceful=False)

    threading.Thread(target=lose, daemon=True).start()
    run_stage(stage, max_failure_rate=0)
    for _ in range(100):
        if ray.available_resources().get("GPU") == ray.cluster_resources().get("GPU"):
            break
        time.sleep(0.1)
    gpus = {"free": ray.available_resources().get("GPU"), "all": ray.cluster_resources().get("GPU")}
    (folder / "gpus.json").write_text(json.dumps(gpus))
    ray.shutdown()
    cluster.shutdown()
"""


PLACED = """
import dataclasses, json, sys, time
from functools import partial
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import aft_ray.gpus as gpus_module
from aft_ray.config import PlacementConfig
from aft_ray.errors import ConfigError
from aft_ray.stages import run_stage
from tests.test_cluster import WhereItRuns
from tests.test_stages import squares

def gpus() -> tuple[float, float]:
    return ray.available_resources().get("GPU", 0), ray.cluster_resources().get("GPU", 0)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=80_000_000))
    for kind, num_gpus in (("H100", 2), ("H100", 2), ("A100", 4)):
        resources = {f"accelerator_type:{kind}": 1}
        cluster.add_node(num_cpus=2, num_gpus=num_gpus, resources=resources, object_store_memory=80_000_000)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    names = {}
    for node in ray.nodes():
        labels = [name for name in node["Resources"] if name.startswith("accelerator_type:")]
        names[node["NodeID"]] = labels[0].partition(":")[2] if labels else "head"
    gpus_module.has_gpu_build = lambda: True  # this machine's torch has no CUDA, and these workers do not use it
    placement = PlacementConfig(accelerator_type="H100", min_actors=2, max_actors=2)  # the engine says how many GPUs
    worker = partial(WhereItRuns, folder / "workers")
    stage = dataclasses.replace(squares(folder), worker=worker, placement=placement, gpus=2)
    run_stage(stage, max_failure_rate=0)
    for _ in range(200):
        if gpus()[0] == gpus()[1]:
            break
        time.sleep(0.1)
    workers = [json.loads(file.read_text()) for file in (folder / "workers").iterdir()]
    refused = {}
    for name, wrong in {"B200": {"accelerator_type": "B200"}, "5 GPUs": {"num_gpus": 5}}.items():
        other = {"output": stage.output.child(name), "placement": PlacementConfig(**wrong)}
        try:
            run_stage(dataclasses.replace(stage, **other), max_failure_rate=0)
        except ConfigError as error:
            refused[name] = str(error)
    found = {"gpus": gpus(), "kinds": [names[one["node"]] for one in workers], "workers": workers, "refused": refused}
    (folder / "found.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()
"""


class WhereItRuns(Squarer):
    """A worker that records its node and its GPUs, and takes no row before two workers have done so."""

    def __init__(self, folder: Path, seconds: float = 0.0) -> None:
        super().__init__(seconds=seconds)
        self.folder = folder
        import ray

        folder.mkdir(exist_ok=True)
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids()["GPU"]
        (folder / str(os.getpid())).write_text(json.dumps({"node": context.get_node_id(), "gpus": gpus}))

    async def process(self, row: dict[str, Any]) -> Processed:
        while len(list(self.folder.iterdir())) < 2:  # noqa: ASYNC110  # the other worker is another process
            await asyncio.sleep(0.1)
        return await super().process(row)


def run_driver(tmp_path: Path, code: str, result: str) -> dict[str, Any]:
    script = tmp_path / "driver.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **QUICK}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / result).read_text())


def test_the_loss_of_a_node_in_mid_stage_costs_no_row_and_the_gpus_are_given_back(tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=60)
    gpus = run_driver(tmp_path, DRIVER, "gpus.json")
    output = Folder.at(tmp_path / "squares")
    assert [row["square"] for row in output.rows()] == [n * n for n in range(60)]
    manifest = read_manifest(output)
    assert manifest is not None
    assert (manifest.status, manifest.rows_out, manifest.completion_tokens) == ("done", 60, 60)
    assert gpus == {"free": 1.0, "all": 1.0}
    workers = [json.loads(file.read_text()) for file in (tmp_path / "workers").iterdir()]
    assert len(workers) >= 2, "the lost node had a worker"
    assert len({one["node"] for one in workers}) == 2


def test_workers_get_the_accelerator_and_the_gpus_they_ask_for_and_what_no_node_has_is_refused(tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=60)
    found = run_driver(tmp_path, PLACED, "found.json")
    assert [row["square"] for row in Folder.at(tmp_path / "squares").rows()] == [n * n for n in range(60)]
    assert found["kinds"] == ["H100", "H100"]
    assert len({one["node"] for one in found["workers"]}) == 2, "a node has two GPUs, so each worker has its own node"
    assert [len(one["gpus"]) for one in found["workers"]] == [2, 2], "as many as tensor_parallel_size"
    assert found["gpus"] == [8, 8], "given back when the stage ends"
    assert "requests 1 CPU, 2 GPU, B200 per worker, and no node has that" in found["refused"]["B200"]
    assert "2 CPU, 2 GPU, H100" in found["refused"]["B200"]
    assert "requests 1 CPU, 5 GPU per worker" in found["refused"]["5 GPUs"], "8 in all, but no node has 5"
