"""How long a small stage without a model takes: made by actors, and by the driver itself.

    python benchmarks/stage_start.py [--rows 64] [--rounds 5]

Nearly all of the time of the first is the start of two processes, its actor and the one that gathers reports.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, help="rows of the stage; above 2048 both go to actors")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{HERE}:{HERE.parent}"
    os.environ.setdefault("RAY_worker_niceness", "0")
    sys.path[:0] = [str(HERE), str(HERE.parent)]

    import pyarrow as pa
    import ray
    from waiting_worker import WaitingWorker

    from aft_ray.config import PlacementConfig
    from aft_ray.runs import Manifest, write_manifest
    from aft_ray.shards import Stage, write_first_shards
    from aft_ray.stages import run_stage
    from aft_ray.storage import Folder

    with tempfile.TemporaryDirectory() as folder:
        schema = pa.schema([("prompt_id", pa.string())])
        source = Folder.at(Path(folder) / "rows")
        write_first_shards(source, ({"prompt_id": f"p-{n}"} for n in range(arguments.rows)), schema, None)
        write_manifest(
            source, Manifest(stage="rows", status="done", fingerprint="", settings={}, rows_out=arguments.rows)
        )
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        stage = Stage(
            name="rows",
            source=source,
            output=source,
            schema=schema,
            settings={},
            worker=partial(WaitingWorker, 0.0),
            placement=PlacementConfig(),
        )
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(arguments.rounds):
            for is_light, taken in seconds.items():
                output = Folder.at(Path(folder) / f"made-{number}-{is_light}")
                began = time.monotonic()
                run_stage(dataclasses.replace(stage, output=output, is_light=is_light), max_failure_rate=0)
                taken.append(time.monotonic() - began)
        ray.shutdown()
    print(f"\nseconds for a stage of {arguments.rows} rows that need no time; {arguments.rounds} rounds, in turn")
    print(f"{'made by':>8} {'median':>8} {'from':>8} {'to':>8}")
    for is_light, taken in seconds.items():
        made_by = "driver" if is_light else "actors"
        print(f"{made_by:>8} {statistics.median(taken):8.2f} {min(taken):8.2f} {max(taken):8.2f}")


if __name__ == "__main__":
    main()
