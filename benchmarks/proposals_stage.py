"""The proposals stage over the bare engine: what Ray Data, shards, templates and resume cost in tokens/s.

    python benchmarks/proposals_stage.py [--prompts 120] [--rounds 4] [--samples 3] [--max-tokens 48]

In each round, the only worker of the stage sends the same requests with the same seeds to its engine before and after
the stage does: bare, stage, bare, on one engine in one process. The ratio is the rate of the stage over the mean of the
two bare rates, and the difference between these shows how exact a ratio is. Each clock runs from the first request of a
round to its last answer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from paired_worker import PairedWorker

from aft_ray.config import Config, load_config
from aft_ray.data import proposals
from aft_ray.data.prompts.stage import make_prompts
from aft_ray.pipeline.cluster import RaySession
from aft_ray.runs import Run
from aft_ray.stages import run_stage

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "configs" / "quickstart.yaml"


def measure(config: Config, num_rounds: int) -> list[dict[str, Any]]:
    """Return tokens and seconds of the stage, and of the bare engine before and after it, for each round."""
    with tempfile.TemporaryDirectory() as folder, RaySession(config) as session:
        run = Run.open(config.model_copy(update={"run": config.run.model_copy(update={"dir": f"{folder}/run"})}))
        make_prompts(run)
        (stage,), (part,) = proposals.stages(run), proposals.parts(config.proposals)
        log = Path(folder) / "log.jsonl"
        worker = partial(PairedWorker, log, stage.source.rows(), num_rounds, config, part)
        run_stage(dataclasses.replace(stage, worker=worker), max_failure_rate=0, connect=session.connect)
        return [json.loads(line) for line in log.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=120, help="of all rounds")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=3, help="per prompt")
    parser.add_argument("--max-tokens", type=int, default=48, help="per sample")
    arguments = parser.parse_args()
    settings = [
        "engine.type=vllm",
        f"prompts.limit={arguments.prompts}",
        "prompts.held_out=0",
        f"proposals.num_per_prompt={arguments.samples}",
        f"proposals.sampling.max_tokens={arguments.max_tokens}",
        "prompts.rows_per_shard=2",
        "proposals.placement.max_shards_in_flight=128",
    ]
    config = load_config(QUICKSTART, settings)
    os.environ["PYTHONPATH"] = f"{HERE}:{HERE.parent}"  # Ray's actors import paired_worker
    size = f"{arguments.prompts // arguments.rounds} prompts x {config.proposals.num_per_prompt} samples"
    print(f"proposals stage / bare engine: {size} a round")
    print(f"{'round':>5} {'tokens':>8} {'bare before, after tok/s':>25} {'stage tok/s':>12} {'ratio':>6}")
    ratios = []
    for number, found in enumerate(measure(config, arguments.rounds)):
        (num_tokens, seconds), bare = found["stage"], found["bare"]
        # Equal requests and seeds; the order of arrival changes the batches, and with them a few tokens in bfloat16.
        assert all(abs(num_tokens - num) < 0.05 * num for num, _ in bare), f"token work: {num_tokens} and {bare}"
        before, after = (num / spent for num, spent in bare)
        ratios.append(num_tokens / seconds / statistics.mean([before, after]))
        both, rate = f"{before:.1f}, {after:.1f}", num_tokens / seconds
        print(f"{number:>5} {num_tokens:>8} {both:>25} {rate:>12.1f} {ratios[-1]:>6.3f}")
    print(f"median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}  (goal >= 0.95)\n")


if __name__ == "__main__":
    main()
