"""The time from the kill of a training worker to the next new step, over the start-up time of the training.

    python benchmarks/training_kill.py [--rounds 3]

SmolLM2-135M, two Ray Train workers with one CPU each, ZeRO-2, a checkpoint at every step. SIGKILL ends one worker; Ray
Train notices, restarts the workers, and they continue from the last checkpoint. The time runs until the first step that
began after the kill is finished; most of it is importing and loading, as in any start.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import psutil
from training_rows import MODEL, write_rows

NUM_STEPS_BETWEEN = 3


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "RayTrainWorker" in child.name()]


def kill_often(metrics: Path, num_kills: int, seconds: list[float]) -> None:
    """Kill a worker after every few steps and measure how long it takes until the file is written again."""

    def until_written_after(moment: float) -> None:
        while not metrics.exists() or metrics.stat().st_mtime <= moment:
            time.sleep(0.02)

    until_written_after(0)
    for _ in range(num_kills):
        for _ in range(NUM_STEPS_BETWEEN):
            until_written_after(metrics.stat().st_mtime)
        victim = workers()[-1]
        killed_at = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(1)  # the other worker may still end the step it is in
        resumed_from = metrics.stat().st_mtime
        until_written_after(resumed_from)  # the resumed training cuts the file back to its checkpoint ...
        until_written_after(metrics.stat().st_mtime)  # ... and then adds its first step
        seconds.append(time.time() - killed_at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    from aft_ray.config import TrainingConfig
    from aft_ray.models import resolve_model
    from aft_ray.storage import Folder
    from aft_ray.training import TrainingJob, TrainProgress, train_adapters

    config = TrainingConfig(
        num_workers=2, batch_size_per_worker=1, save_steps=1, max_failures=arguments.rounds, deepspeed="zero2"
    )
    first_step: list[float] = []

    def watch(state: TrainProgress) -> None:
        if state.step and not first_step:
            first_step.append(state.seconds)

    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        metrics = folder / "checkpoints" / "aft" / "metrics.jsonl"
        threading.Thread(target=kill_often, args=(metrics, arguments.rounds, seconds), daemon=True).start()
        job = TrainingJob(
            config=config,
            model=resolve_model(MODEL),
            training_set=Folder.at(write_rows(folder / "rows", 12 * (arguments.rounds + 1), (40, 240))),
            outputs={"aft": Folder.at(folder / "model")},
            checkpoints=Folder.at(folder / "checkpoints"),
            seed=1,
        )
        train_adapters(job, report=watch)
    print(f"from a killed worker to the first new step: {MODEL}, two workers, ZeRO-2, a checkpoint at every step")
    print(f"start-up to the first step: {first_step[0]:.1f} s (Ray included)")
    print(f"kill to the first new step: {', '.join(f'{one:.1f}' for one in seconds)} s")
    print(f"median ratio {statistics.median(one / first_step[0] for one in seconds):.2f}\n")


if __name__ == "__main__":
    main()
