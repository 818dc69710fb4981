"""A stage on a cluster of several (simulated) nodes: it spreads, it survives the loss of a node, it gives GPUs back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from aft_ray.runs import read_manifest
from aft_ray.storage import Folder
from tests.test_stages import source

ROOT = Path(__file__).parent.parent

DRIVER = """
import dataclasses, json, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from aft_ray.config import PlacementConfig
from aft_ray.stages import run_stage
from tests.test_stages import squares

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    small = dict(object_store_memory=80_000_000, num_gpus=1)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, object_store_memory=80_000_000))
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    placement = PlacementConfig(num_cpus=1, num_gpus=1, min_actors=1, max_actors=2, max_shards_in_flight=2)
    stage = dataclasses.replace(squares(folder, seconds=0.3), placement=placement)

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


def run_driver(tmp_path: Path) -> dict[str, Any]:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_health_check_period_ms": "500"}
    environment["RAY_health_check_failure_threshold"] = "3"
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "gpus.json").read_text())


def test_the_loss_of_a_node_in_mid_stage_costs_no_row_and_the_gpus_are_given_back(tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=60)
    gpus = run_driver(tmp_path)
    output = Folder.at(tmp_path / "squares")
    assert [row["square"] for row in output.rows()] == [n * n for n in range(60)]
    manifest = read_manifest(output)
    assert manifest is not None
    assert (manifest.status, manifest.rows_out, manifest.completion_tokens) == ("done", 60, 60)
    assert gpus == {"free": 1.0, "all": 1.0}
