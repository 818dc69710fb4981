"""Kills processes: many times at random moments, a training worker when a condition holds, a driver with its Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["aft_ray.data.prompts.stage", "aft_ray.data.targets", "datasketch", "transformers"])


def kill_many_times(work: Callable[..., object], *arguments: Any, num_kills: int, seed: int) -> int:
    """Start `work(*arguments)` in a process `num_kills` times and kill it; return how often it was still at work.

    A process that was faster than its kill must have ended well, and tells how early the next ones must be killed.
    """
    draw = random.Random(seed)
    longest, num_killed = 1.0, 0
    for _ in range(num_kills):
        process = PROCESSES.Process(target=work, args=arguments)
        process.start()
        started = time.monotonic()
        process.join(draw.random() * longest)
        if process.exitcode is None:
            process.kill()
            process.join()
            num_killed += 1
        else:
            assert process.exitcode == 0
            longest = 0.9 * (time.monotonic() - started)
    return num_killed


def when(condition: Callable[[], bool], action: Callable[[], None]) -> None:
    """Wait for the condition, at most 900 s, and then act."""
    end = time.monotonic() + 900
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    action()


def kill_a_train_worker() -> None:
    """Kill one of the Ray Train workers below this process."""
    workers = [child for child in psutil.Process().children(recursive=True) if _is_train_worker(child)]
    os.kill(workers[-1].pid, signal.SIGKILL)


def _is_train_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in process.name() + " ".join(process.cmdline())
    except psutil.Error:  # it ended after it was listed
        return False


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill the driver first, so that it cannot notice, then raylet, workers and the rest of its Ray."""
    below = psutil.Process(process.pid).children(recursive=True)
    for victim in [psutil.Process(process.pid), *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    process.wait()
