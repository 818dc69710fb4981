"""What nodes and jobs cost before their first token, and after their last.

    python benchmarks/autoscaling.py nodes [--rounds 3]     # needs root and iproute2
    python benchmarks/autoscaling.py job [--rounds 3]

nodes  Ray's fake provider adds up to three nodes of one worker each, from zero, and takes them back six seconds after
       their last use. Per round: seconds from the call of a stage to the first node and to the first row under way; and
       node-seconds paid (a node is alive) over node-seconds used (its worker has a row under way).
job    A head with a job server, and the data stages of a scripted model that answers at once. Per round: seconds from
       `aft-ray submit` to the first proposals, and the seconds of each stage during which no worker was ready: what a
       stage costs however few its rows are.

On a cloud the time until a node has booted comes on top; here it is a process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
MAX_NODES = 3
NUM_ROWS, SECONDS_PER_ROW = 360, 6.0
IDLE_MINUTES = 0.1
DATA_STAGES = ("proposals", "scores", "selection", "targets")


def drive(folder: Path) -> None:
    """Run the stage on the cluster that this host finds, and print what was measured as JSON."""
    import pyarrow as pa
    import ray
    from timed_worker import TimedWorker

    from aft_ray.config import PlacementConfig
    from aft_ray.runs import Manifest, write_manifest
    from aft_ray.shards import Stage, write_first_shards
    from aft_ray.stages import run_stage
    from aft_ray.storage import Folder
    from tests.autoscaling import wait, workers

    schema = pa.schema([("prompt_id", pa.string())])
    source = Folder.at(folder / "rows")
    write_first_shards(source, ({"prompt_id": f"p-{n}"} for n in range(NUM_ROWS)), schema, 4)
    write_manifest(source, Manifest(stage="rows", status="done", fingerprint="", settings={}, rows_out=NUM_ROWS))
    ray.init(log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    alive: list[tuple[float, int]] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.is_set():
            alive.append((time.time(), len(workers())))
            time.sleep(0.1)

    (folder / "times").mkdir()
    stage = Stage(
        name="waiting",
        source=source,
        output=Folder.at(folder / "waited"),
        schema=schema,
        settings={},
        worker=partial(TimedWorker, SECONDS_PER_ROW, folder / "times"),
        placement=PlacementConfig(num_cpus=2, min_actors=1, max_actors=MAX_NODES, max_shards_in_flight=2),
    )
    sampling = threading.Thread(target=sample)
    sampling.start()
    asked = time.time()
    run_stage(stage, max_failure_rate=0)
    worked = time.time()
    wait(lambda: not workers())
    is_over.set()
    sampling.join()
    by_worker = [[json.loads(line) for line in file.read_text().splitlines()] for file in (folder / "times").iterdir()]
    found = {
        "first node": next(at for at, num in alive if num) - asked,
        "first row": min(began for times in by_worker for began, _ in times) - asked,
        "stage": worked - asked,
        "paid": sum(num * (after - at) for (at, num), (after, _) in itertools.pairwise(alive)),
        "used": sum(covered(times) for times in by_worker),
        "nodes": max(num for _, num in alive),
    }
    print(json.dumps(found))


def covered(times: Sequence[tuple[float, float]]) -> float:
    """Return the seconds that are within at least one interval."""
    total, until = 0.0, 0.0
    for begin, end in sorted(times):
        total += max(end - max(begin, until), 0)
        until = max(until, end)
    return total


def nodes(rounds: int) -> None:
    from tests.autoscaling import start_autoscaling_ray
    from tests.hosts import hosts

    print(f"{'first node':>11} {'first row':>10} {'stage':>6} {'paid':>6} {'used':>6} {'paid/used':>10}", flush=True)
    with hosts(1) as cluster:
        start_autoscaling_ray(cluster, num_gpus=0, max_workers=MAX_NODES, idle_minutes=IDLE_MINUTES)
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                done = cluster.run(
                    0, [sys.executable, __file__, "drive", folder], env={"PYTHONPATH": f"{HERE}:{HERE.parent}"}
                )
            one = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
            print(
                f"{one['first node']:>9.1f} s {one['first row']:>8.1f} s {one['stage']:>4.0f} s {one['paid']:>6.0f} "
                f"{one['used']:>6.0f} {one['paid'] / one['used']:>10.2f}   {one['nodes']} nodes",
                flush=True,
            )


def job(rounds: int) -> None:
    from tests.ray_head import ray_head, submit

    overheads: list[float] = []
    print(f"{'first answers':>13} {'job ended':>10}   seconds without a worker, by stage", flush=True)
    with ray_head() as head, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "prompts.jsonl").write_text("".join(f'{{"prompt": "Name {n} birds."}}\n' for n in range(64)))
        for number in range(rounds):
            run = place / f"run-{number}"
            (place / "run.yaml").write_text(
                f"run: {{dir: {run}}}\nengine: {{type: scripted}}\n"
                "prompts: {source: prompts.jsonl, held_out: 0, rows_per_shard: 4}\nscores: {scorer: length}\n"
            )
            asked = time.time()
            submit(head, place, "pipeline")  # it ends at the training set, for which a scripted model has no tokenizer
            ended = time.time() - asked
            first = min(file.stat().st_mtime for file in (run / "proposals").glob("*.parquet")) - asked
            manifests = [json.loads((run / stage / "manifest.json").read_text()) for stage in DATA_STAGES]
            waits = [manifest["seconds"] - manifest["busy_seconds"] for manifest in manifests]
            overheads += waits
            by_stage = "  ".join(f"{stage} {wait:.1f}" for stage, wait in zip(DATA_STAGES, waits, strict=True))
            print(f"{first:>11.1f} s {ended:>8.1f} s   {by_stage}", flush=True)
    print(f"{'':>26}   median {statistics.median(overheads):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("nodes", "job", "drive"), metavar="nodes|job")
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what == "drive":
        drive(arguments.folder)
    else:
        {"nodes": nodes, "job": job}[arguments.what](arguments.rounds)


if __name__ == "__main__":
    main()
