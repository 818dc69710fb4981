"""SIGKILL at random moments, many times."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["aft_ray.data.first_shards", "aft_ray.data.targets", "datasketch", "transformers"])


def kill_many_times(work: Callable[..., object], *arguments: Any, num_kills: int, seed: int) -> int:
    """Start `work(*arguments)` in a process `num_kills` times and kill it; returns how often it was still at work.

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
