"""The cost of an engine's death: seconds of a stage whose engine dies again and again, over one whose engine lives.

    python benchmarks/engine_death.py [--prompts 400] [--dies-after 100] [--rounds 3]

The proposals stage runs with a scripted model of 20 ms per token, which dies after a number of requests and is built
again in place. Rows begin at random moments. The seconds lost per death are those of the rows in flight, which are made
again. The time that a real model takes to load comes on top of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from counted_worker import CountedWorker

from aft_ray.config import Config
from aft_ray.data import proposals
from aft_ray.data.prompts.stage import make_prompts
from aft_ray.pipeline.cluster import RaySession
from aft_ray.runs import Run
from aft_ray.stages import run_stage

HERE = Path(__file__).parent
NUM_TOKENS, SECONDS_PER_TOKEN, ROWS_PER_SHARD, SHARDS_IN_FLIGHT = 64, 0.02, 8, 2


def measure(num_prompts: int, dies_after: int | None) -> tuple[float, int]:
    """Return the seconds of the stage while a worker was ready, and the number of deaths."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "built").mkdir()
        source = folder / "prompts.jsonl"
        source.write_text("".join(f'{{"prompt": "Name {n} birds."}}\n' for n in range(num_prompts)))
        engine: dict[str, Any] = {"type": "scripted", "num_tokens": NUM_TOKENS, "seconds_per_token": SECONDS_PER_TOKEN}
        config = Config.model_validate(
            {
                "run": {"dir": str(folder / "run")},
                "engine": {**engine, "dies_after": dies_after},
                "prompts": {"source": str(source), "rows_per_shard": ROWS_PER_SHARD, "held_out": 0},
                "proposals": {"placement": {"max_shards_in_flight": SHARDS_IN_FLIGHT}},
            }
        )
        with RaySession(config) as session:
            run = Run.open(config)
            make_prompts(run)
            (stage,), (part,) = proposals.stages(run), proposals.parts(config.proposals)
            worker = partial(CountedWorker, folder / "built", NUM_TOKENS * SECONDS_PER_TOKEN, config, part)
            done = run_stage(dataclasses.replace(stage, worker=worker), max_failure_rate=0, connect=session.connect)
        assert done.rows_out == num_prompts
        assert not done.failed
        return done.busy_seconds, len(list((folder / "built").iterdir())) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--dies-after", type=int, default=100, help="requests of one engine")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{HERE}:{HERE.parent}"  # Ray's actors import counted_worker
    in_flight = ROWS_PER_SHARD * SHARDS_IN_FLIGHT
    print(
        f"an engine that dies every {arguments.dies_after} requests; {arguments.prompts} prompts, {in_flight} at a time"
    )
    print(f"a row takes {NUM_TOKENS * SECONDS_PER_TOKEN:.2f} s, after a random wait of up to as long")
    print(f"{'round':>5} {'whole s':>8} {'dying s':>8} {'deaths':>7} {'lost s per death':>17}")
    lost = []
    for number in range(arguments.rounds):
        (whole, none), (dying, deaths) = (
            measure(arguments.prompts, None),
            measure(arguments.prompts, arguments.dies_after),
        )
        assert (none, deaths > 0) == (0, True)
        lost.append((dying - whole) / deaths)
        print(f"{number:>5} {whole:>8.1f} {dying:>8.1f} {deaths:>7} {lost[-1]:>17.2f}", flush=True)
    print(f"median {statistics.median(lost):.2f} s per death\n")


if __name__ == "__main__":
    main()
