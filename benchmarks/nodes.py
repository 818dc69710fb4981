"""A stage on 1 to 4 simulated nodes: its rows per second over those of one node times the number of nodes.

    python benchmarks/nodes.py [--nodes 1 2 4] [--rounds 1] [--rows 1536] [--seconds 1]

Every node is a separate raylet on this machine with room for one worker, and a row takes one second of waiting, 64 rows
at a time per worker. The stage may use one worker or as many as there are nodes. So the benchmark measures whether the
work spreads and stays spread, not the cores of the machine: with many nodes, rows must take longer for that. The rate
is measured between the first and the last finished shard. The driver's processor time per shard is what the scheduling
of a shard costs where no other work is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
ROWS_PER_SHARD = 8


def drive(num_nodes: int, rows_per_node: int, seconds: float, folder: Path) -> None:
    """Run one cluster size and print its rows per second."""
    import pyarrow as pa
    import ray
    from ray.cluster_utils import Cluster
    from waiting_worker import WaitingWorker

    from aft_ray.config import PlacementConfig
    from aft_ray.runs import Manifest, write_manifest
    from aft_ray.shards import Stage, write_first_shards
    from aft_ray.stages import run_stage
    from aft_ray.storage import Folder

    schema = pa.schema([("prompt_id", pa.string())])
    source = Folder.at(folder / "rows")
    num_rows = rows_per_node * num_nodes
    write_first_shards(source, ({"prompt_id": f"p-{n}"} for n in range(num_rows)), schema, ROWS_PER_SHARD)
    write_manifest(source, Manifest(stage="rows", status="done", fingerprint="", settings={}, rows_out=num_rows))
    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0})
    for _ in range(num_nodes):
        cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    ray.data.DataContext.get_current().enable_progress_bars = False
    stage = Stage(
        name="waiting",
        source=source,
        output=Folder.at(folder / "waited"),
        schema=schema,
        settings={},
        worker=partial(WaitingWorker, seconds),
        placement=PlacementConfig(min_actors=1, max_actors=num_nodes, max_shards_in_flight=8),
    )
    used = time.process_time()
    manifest = run_stage(stage, max_failure_rate=0)
    used = time.process_time() - used
    times = sorted(path.stat().st_mtime for path in (folder / "waited").glob("*.parquet"))
    rate = (len(times) - 1) * ROWS_PER_SHARD / (times[-1] - times[0])
    print(json.dumps({"rate": rate, "workers": manifest.num_workers, "driver_ms": 1e3 * used / len(times)}))
    ray.shutdown()
    cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1_536, help="rows per node")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds that a row takes")
    parser.add_argument("--drive", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(int(arguments.drive[0]), arguments.rows, arguments.seconds, Path(arguments.drive[1]))
        return
    print(
        f"a stage on simulated nodes: {arguments.rows} rows of {arguments.seconds:g} s per node, 64 at a time per actor"
    )
    print(f"{'nodes':>5} {'workers':>7} {'rows/s':>8} {'efficiency':>11} {'driver, ms per shard':>21}")
    per_node = 0.0
    for num_nodes in arguments.nodes * arguments.rounds:
        with tempfile.TemporaryDirectory() as folder:
            sizes = ["--rows", str(arguments.rows), "--seconds", str(arguments.seconds)]
            command = [sys.executable, __file__, *sizes, "--drive", str(num_nodes), folder]
            environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "RAY_USAGE_STATS_ENABLED": "0"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        numbers = [line for line in done.stdout.splitlines() if line.startswith('{"rate"')]
        if done.returncode or not numbers:
            raise SystemExit(done.stderr)
        rate, workers, driver_ms = (json.loads(numbers[-1])[name] for name in ("rate", "workers", "driver_ms"))
        per_node = per_node or rate / num_nodes
        efficiency = rate / (num_nodes * per_node)
        print(f"{num_nodes:>5} {workers:>7} {rate:>8.1f} {efficiency:>11.2f} {driver_ms:>21.1f}", flush=True)
    print()


if __name__ == "__main__":
    main()
