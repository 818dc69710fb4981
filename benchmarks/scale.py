"""Rows per second and memory of the driver, from a thousand prompts up, with a scripted model.

    python benchmarks/scale.py [--rows 1000 10000 100000] [--until prompts] [--near-duplicates 0.8]

Each size is a separate process that runs prompts, proposals, scores and selection. Its peak resident memory is that of
the driver, since actors are other processes. Constant memory means that the driver holds no rows.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("prompts", "proposals", "scores", "selection")


def drive(num_rows: int, folder: Path, until: str, near_duplicates: float | None) -> None:
    """Run one size and print its numbers as JSON. Near duplicates are searched among prompts of 25 random words."""
    from aft_ray.config import Config
    from aft_ray.pipeline.cluster import RaySession
    from aft_ray.pipeline.steps import STEPS
    from aft_ray.runs import Run

    source = folder / "prompts.jsonl"
    draw = random.Random(0)
    words = [f"{draw.choice('bcdfghklmnprst')}{draw.choice('aeiou')}{n}" for n in range(5_000)]
    with source.open("w") as file:
        for n in range(num_rows):
            text = f"What is {n} plus {n % 97}?" if near_duplicates is None else " ".join(draw.choices(words, k=25))
            file.write(json.dumps({"prompt": text, "reference": str(n + n % 97)}) + "\n")
    config = Config.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "engine": {"type": "scripted", "num_tokens": 8},
            "prompts": {"source": str(source), "task": "numeric", "near_duplicates": near_duplicates},
            "proposals": {"num_per_prompt": 2, "placement": {"max_actors": 2}},
            "scores": {"placement": {"max_actors": 2}},
            "selection": {"num_proposals": 2, "placement": {"max_actors": 2}},
        }
    )
    run = Run.open(config)
    seconds = {}
    with RaySession(config) as session:
        session.connect()
        for name in STAGES[: STAGES.index(until) + 1]:
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
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to run")
    parser.add_argument("--near-duplicates", type=float, help="also look for near duplicates: prompts.near_duplicates")
    parser.add_argument("--drive", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(int(arguments.drive[0]), Path(arguments.drive[1]), arguments.until, arguments.near_duplicates)
        return
    print("rows/s by stage, and the driver's peak memory: scripted model, 2 samples of 8 tokens")
    stages = STAGES[: STAGES.index(arguments.until) + 1]
    print(f"{'rows':>9} " + " ".join(f"{name:>10}" for name in stages) + f" {'MiB':>7} {'over first':>11}")
    first = 0.0
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--drive", str(num_rows), folder, "--until", arguments.until]
            if arguments.near_duplicates is not None:
                command += ["--near-duplicates", str(arguments.near_duplicates)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        numbers = json.loads(done.stdout.splitlines()[-1])
        rates = " ".join(f"{num_rows / max(numbers['seconds'][name], 0.1):>10.0f}" for name in stages)
        first = first or numbers["peak_mib"]
        print(f"{num_rows:>9} {rates} {numbers['peak_mib']:>7.0f} {numbers['peak_mib'] / first:>11.2f}", flush=True)
    print()


if __name__ == "__main__":
    main()
