"""Rows per second and the driver's memory from a thousand prompts up, with a scripted model.

    python benchmarks/scale.py [--rows 1000 10000 100000]

Each size is a process of its own that runs prompts, proposals, scores and selection; its peak resident memory is the
driver's (actors are other processes). Flat memory means that a row costs the driver nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("prompts", "proposals", "scores", "selection")


def drive(num_rows: int, folder: Path) -> None:
    """One size; prints its numbers as JSON."""
    from aft_ray.config import Config
    from aft_ray.pipeline.cluster import RaySession
    from aft_ray.pipeline.steps import STEPS
    from aft_ray.runs import Run

    source = folder / "prompts.jsonl"
    with source.open("w") as file:
        for n in range(num_rows):
            file.write(json.dumps({"prompt": f"What is {n} plus {n % 97}?", "reference": str(n + n % 97)}) + "\n")
    config = Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "engine": {"type": "scripted", "num_tokens": 8},
            "prompts": {"source": str(source), "task": "numeric"},
            "proposals": {"num_per_prompt": 2, "placement": {"max_actors": 2}},
            "scores": {"placement": {"max_actors": 2}},
            "selection": {"num_proposals": 2, "placement": {"max_actors": 2}},
        }
    )
    run = Run.open(config)
    seconds = {}
    with RaySession(config) as session:
        session.connect()
        for name in STAGES:
            started = time.monotonic()
            STEPS[name](run, session)
            manifest = run.manifest(name)
            assert manifest is not None and manifest.rows_out == num_rows
            seconds[name] = manifest.busy_seconds or time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mib": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--drive", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(int(arguments.drive[0]), Path(arguments.drive[1]))
        return
    print("rows/s by stage, and the driver's peak memory: scripted model, 2 samples of 8 tokens")
    print(f"{'rows':>9} " + " ".join(f"{name:>10}" for name in STAGES) + f" {'MiB':>7} {'over first':>11}")
    first = 0.0
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--drive", str(num_rows), folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        numbers = json.loads(done.stdout.splitlines()[-1])
        rates = " ".join(f"{num_rows / max(numbers['seconds'][name], 0.1):>10.0f}" for name in STAGES)
        first = first or numbers["peak_mib"]
        print(f"{num_rows:>9} {rates} {numbers['peak_mib']:>7.0f} {numbers['peak_mib'] / first:>11.2f}", flush=True)
    print()


if __name__ == "__main__":
    main()
