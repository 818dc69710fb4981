"""Peak memory of the driver of a stage, from ten thousand rows to a million: it should not grow with the rows.

    python benchmarks/stage_memory.py [--rows 10000 100000 1000000]

Each size is a separate process. Its one stage returns every row unchanged, in two workers, so that what the driver does
for a row would show. The memory is the growth of the peak resident size from when Ray is connected to the end; the rate
is rows per second while a worker was ready.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
SCHEMA_TEXT = "What is the sum of these numbers? " * 4


def drive(num_rows: int, folder: Path) -> None:
    """Run one size and print its numbers as JSON."""
    import logging

    import pyarrow as pa
    import ray
    from waiting_worker import WaitingWorker

    from aft_ray.config import PlacementConfig
    from aft_ray.runs import Manifest, write_manifest
    from aft_ray.shards import Stage, write_first_shards
    from aft_ray.stages import run_stage
    from aft_ray.storage import Folder

    schema = pa.schema([("prompt_id", pa.string()), ("text", pa.string())])
    source = Folder.at(folder / "rows")
    rows = ({"prompt_id": f"p-{n}", "text": f"{n} {SCHEMA_TEXT}"} for n in range(num_rows))
    write_first_shards(source, rows, schema, None)
    write_manifest(source, Manifest(stage="rows", status="done", fingerprint="", settings={}, rows_out=num_rows))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    stage = Stage(
        name="unchanged",
        source=source,
        output=Folder.at(folder / "out"),
        schema=schema,
        settings={},
        worker=partial(WaitingWorker, 0.0),
        placement=PlacementConfig(min_actors=1, max_actors=2),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = run_stage(stage, max_failure_rate=0)
    assert manifest.rows_out == num_rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"before": before / 1024, "peak": peak / 1024, "rate": num_rows / manifest.busy_seconds}
    print(json.dumps({**found, "files": len(manifest.files)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--drive", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(int(arguments.drive[0]), Path(arguments.drive[1]))
        return
    print("peak memory of a stage's driver: rows that are returned unchanged, two workers")
    print(f"{'rows':>9} {'files':>6} {'rows/s':>8} {'connected MiB':>14} {'peak MiB':>9} {'growth MiB':>11}")
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--drive", str(num_rows), folder]
            environment = {**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}", "RAY_USAGE_STATS_ENABLED": "0"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"before"')]
        if done.returncode or not lines:
            raise SystemExit(done.stderr)
        one = json.loads(lines[-1])
        growth = one["peak"] - one["before"]
        numbers = f"{one['rate']:>8.0f} {one['before']:>14.0f} {one['peak']:>9.0f} {growth:>11.0f}"
        print(f"{num_rows:>9} {one['files']:>6} {numbers}", flush=True)
    print()


if __name__ == "__main__":
    main()
