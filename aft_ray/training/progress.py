"""Progress reports of a running training: a thread reads the metrics files of the workers and reports the changes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from aft_ray.errors import StorageError
from aft_ray.training.adapter import is_finished
from aft_ray.training.metrics import HELD_OUT, METRICS, UPLOAD_S, has_stopped_early
from aft_ray.training.task import Phase, TrainProgress, TrainTask

POLL_S = 0.5
QUIET_S = 3.0
"""Longest time between two reports, even when nothing changes."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def progress_reports(
    tasks: Sequence[TrainTask],
    called_at: float,
    report: Callable[[TrainProgress], None] | None,
    is_waiting: Callable[[], bool],
) -> Iterator[None]:
    """Inside this context, `report` is called after each new step and at least every few seconds.

    `is_waiting` says whether the cluster is too small for the workers at the moment.
    """
    if report is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_report_changes, args=(tasks, called_at, report, is_waiting, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _report_changes(
    tasks: Sequence[TrainTask],
    called_at: float,
    report: Callable[[TrainProgress], None],
    is_waiting: Callable[[], bool],
    stop: threading.Event,
) -> None:
    reported: TrainProgress | None = None
    reported_at = 0.0
    while True:
        last = stop.wait(POLL_S if tasks[0].folder.is_local else UPLOAD_S)
        try:
            progress = current(tasks, called_at)
        except StorageError:  # the next look may succeed, and the training itself will say if none does
            if last:
                return
            continue
        if progress.phase != "checking" and is_waiting():
            progress = dataclasses.replace(progress, phase="waiting for nodes")
        is_new = reported is None or (progress.variant, progress.phase, progress.step) != (
            reported.variant,
            reported.phase,
            reported.step,
        )
        if is_new or time.monotonic() - reported_at > QUIET_S:
            report(progress)
            reported, reported_at = progress, time.monotonic()
        if last:
            return


def current(tasks: Sequence[TrainTask], called_at: float) -> TrainProgress:
    """Return the progress of the first unfinished task, or of the last task when all are finished."""
    task = next((task for task in tasks if not is_finished(task)), tasks[-1])
    rows = task.folder.json_lines(METRICS)
    step = rows[-1]["step"] if rows else 0
    num_steps = step if has_stopped_early(task.folder.json_lines(HELD_OUT)) else task.num_steps
    phase: Phase = "starting" if not rows else "training" if step < num_steps else "checking"
    num_tokens = sum(row["tokens"] for row in rows)
    return TrainProgress(
        variant=task.variant,
        phase=phase,
        step=step,
        num_steps=num_steps,
        loss=rows[-1]["loss"] if rows else None,
        num_tokens=num_tokens,
        num_trained_tokens=sum(row["trained_tokens"] for row in rows),
        seconds=time.time() - called_at,
        tokens_per_second=num_tokens / max(sum(row["seconds"] for row in rows), 1e-9),
    )
