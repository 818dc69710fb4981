"""What a training is doing, told while it runs: a thread reads the workers' metrics files and reports what it finds."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from aft_ray.training.metrics import read_metrics
from aft_ray.training.task import Phase, TrainProgress, TrainTask

POLL_S = 0.5
QUIET_S = 3.0
"""Something is reported at least this often, even when nothing has changed."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def watch(
    tasks: Sequence[TrainTask],
    called_at: float,
    report: Callable[[TrainProgress], None] | None,
    is_waiting: Callable[[], bool],
) -> Iterator[None]:
    """Inside, `report` is called after every step that is seen, and at least every few seconds.

    `is_waiting`: whether the cluster is too small for the workers just now.
    """
    if report is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(tasks, called_at, report, is_waiting, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(
    tasks: Sequence[TrainTask],
    called_at: float,
    report: Callable[[TrainProgress], None],
    is_waiting: Callable[[], bool],
    stop: threading.Event,
) -> None:
    told: TrainProgress | None = None
    told_at = 0.0
    while True:
        last = stop.wait(POLL_S)
        progress = current(tasks, called_at)
        if progress.phase != "checking" and is_waiting():
            progress = dataclasses.replace(progress, phase="waiting for nodes")
        news = told is None or (progress.variant, progress.phase, progress.step) != (
            told.variant,
            told.phase,
            told.step,
        )
        if news or time.monotonic() - told_at > QUIET_S:
            report(progress)
            told, told_at = progress, time.monotonic()
        if last:
            return


def current(tasks: Sequence[TrainTask], called_at: float) -> TrainProgress:
    """Where the first unfinished task is; the last one where all are done."""
    task = next((task for task in tasks if not task.output.exists()), tasks[-1])
    rows = read_metrics(task.metrics_file)
    step = rows[-1]["step"] if rows else 0
    phase: Phase = "starting" if not rows else "training" if step < task.num_steps else "checking"
    num_tokens = sum(row["tokens"] for row in rows)
    return TrainProgress(
        variant=task.variant,
        phase=phase,
        step=step,
        num_steps=task.num_steps,
        loss=rows[-1]["loss"] if rows else None,
        num_tokens=num_tokens,
        num_trained_tokens=sum(row["trained_tokens"] for row in rows),
        seconds=time.time() - called_at,
        tokens_per_second=num_tokens / max(sum(row["seconds"] for row in rows), 1e-9),
    )
