"""Proposals stage over the bare engine: what sharding, Ray Data and resume cost in tokens/s.

    python benchmarks/proposals_stage.py [--prompts 120] [--rounds 3]

Both sides build the same vLLM engine and make the same requests with the same seeds, so the token work is equal. The
clock runs from the first request to the last answer: start-up of Ray and of the engine is not part of either side.
The sides alternate, stage first, and the ratio is taken round by round.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from timed_worker import TimedWorker

from aft_ray.config import Config, load_config
from aft_ray.data import proposals
from aft_ray.data.first_shards import make_prompts
from aft_ray.pipeline.cluster import RaySession
from aft_ray.runs import Run
from aft_ray.stages import run_stage

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "configs" / "quickstart.yaml"


def tokens_per_second(log: Path) -> tuple[int, float]:
    spans = [json.loads(line) for line in log.read_text().splitlines()]
    tokens = sum(span[2] for span in spans)
    return tokens, tokens / (max(span[1] for span in spans) - min(span[0] for span in spans))


def stage_side(config: Config, log: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, RaySession(config) as session:
        run = Run.open(config.model_copy(update={"run": config.run.model_copy(update={"dir": f"{folder}/run"})}))
        make_prompts(run)
        stage = proposals.stage(run)
        worker = partial(TimedWorker, log, config.proposals, config.engine, config.templates, config.run.seed)
        run_stage(dataclasses.replace(stage, worker=worker), max_failure_rate=0, connect=session.connect)


def bare_side(config: Config, log: Path) -> None:
    """Every prompt at once on the engine, nothing else."""
    from aft_ray.data.prompts import read_prompts

    async def work() -> None:
        worker = TimedWorker(log, config.proposals, config.engine, config.templates, config.run.seed)
        await asyncio.gather(*(worker.process(row) for row in read_prompts(config.prompts)))
        await worker.engine.close()

    asyncio.run(work())


def measure(side: Any, config: Config) -> tuple[int, float]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        process = multiprocessing.get_context("spawn").Process(target=side, args=(config, log))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{side.__name__} ended with exit code {process.exitcode}")
        return tokens_per_second(log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = [
        "engine.type=vllm",
        f"prompts.limit={arguments.prompts}",
        "prompts.held_out=0",
        "proposals.placement.max_shards_in_flight=64",
    ]
    config = load_config(QUICKSTART, settings)
    os.environ["PYTHONPATH"] = str(HERE)  # Ray's actors import timed_worker
    print(f"proposals stage / bare engine: {arguments.prompts} prompts x {config.proposals.num_per_prompt} samples")
    print(f"{'round':>5} {'tokens':>8} {'bare tok/s':>11} {'stage tok/s':>12} {'ratio':>6}")
    ratios = []
    for number in range(arguments.rounds):
        stage_tokens, stage_rate = measure(stage_side, config)
        bare_tokens, bare_rate = measure(bare_side, config)
        # Equal requests and seeds; the order of arrival changes the batches, and with them a few tokens in bfloat16.
        assert abs(stage_tokens - bare_tokens) < 0.02 * bare_tokens, f"token work: {stage_tokens} and {bare_tokens}"
        ratios.append(stage_rate / bare_rate)
        print(f"{number:>5} {bare_tokens:>8} {bare_rate:>11.1f} {stage_rate:>12.1f} {ratios[-1]:>6.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}  (goal >= 0.97)\n")


if __name__ == "__main__":
    main()
