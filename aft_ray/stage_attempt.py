"""What one attempt at a stage has made so far, and how it is told: in the manifest, and in the progress line."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from aft_ray.progress import Progress
from aft_ray.runs import Manifest, write_manifest
from aft_ray.shards import ShardSummary, Stage, Tally
from aft_ray.stage_workers import Outcome, Workforce

WRITE_EVERY_S = 30.0
"""The manifest is written so often. A driver that is killed loses the hashes of the files that came since: these files
are read again."""
SUMS = ("rows_in", "rows_out", "prompt_tokens", "completion_tokens", "cost_usd", "num_estimated")
"""Fields of the shards whose sums go into the manifest."""


class Attempt:
    """The shards that a stage has, the ones that this attempt adds, and the workers that make them."""

    def __init__(
        self,
        stage: Stage,
        manifest: Manifest,
        there: Mapping[str, ShardSummary],
        todo: Sequence[str],
        num_rows: int,
        retry_failed: bool = False,
    ) -> None:
        self.stage, self.before, self.num_rows, self.retry_failed = stage, manifest, num_rows, retry_failed
        self.shards = dict(there)
        self.num_failed = 0 if retry_failed else sum(shard.num_failed for shard in there.values())
        """Rows that failed. Those that are tried again do not count until they have failed again."""
        # The hash of a shard that is written again must not outlive it.
        self.files = {name: sha256 for name, sha256 in manifest.files.items() if name in there and name not in todo}
        self.already = self.num_done = sum(self._num_kept(shard) for shard in there.values())
        """Rows that need nothing more: before the attempt, and now."""
        self.new_failed = self.new_tokens = 0
        self.nodes: dict[str, str] = {}
        """Node by worker."""
        self.ready_s: dict[str, float] = {}
        """Seconds by worker from when it was ready to its last finished shard."""
        self.gpus_per_worker = manifest.gpus_per_worker
        self.started = time.monotonic()
        self.first_ready: float | None = None
        self.written = 0.0

    @property
    def first_failure(self) -> str:
        return next((shard.first_failure for shard in self.shards.values() if shard.first_failure), "")

    @property
    def first_unusable(self) -> str:
        return next((shard.first_unusable for shard in self.shards.values() if shard.first_unusable), "")

    def fails_too_often(self, max_failure_rate: float) -> bool:
        """Return whether the attempt should end. The stage's end counts exactly, and stops the run."""
        return self.num_failed > max_failure_rate * self.num_rows

    def _num_kept(self, shard: ShardSummary) -> int:
        """Return the number of rows of a shard that this attempt leaves as they are."""
        return shard.rows_in - (shard.num_failed if self.retry_failed else 0)

    def add(self, outcome: Outcome, made: ShardSummary) -> None:
        """Take a finished shard into account, and write the manifest if that is due."""
        now = time.monotonic()
        earlier = self.shards.get(made.name)
        self.new_tokens += made.completion_tokens - (earlier.completion_tokens if earlier else 0)
        newly_failed = made.num_failed - (earlier.num_failed if earlier and not self.retry_failed else 0)
        self.num_failed += newly_failed
        self.new_failed += newly_failed
        self.num_done += made.rows_in - (self._num_kept(earlier) if earlier else 0)
        self.shards[made.name] = made
        if made.sha256 is not None:
            self.files[made.name] = made.sha256
        self.nodes[outcome.worker] = outcome.node
        self.ready_s[outcome.worker] = outcome.ready_s
        self.first_ready = min(self.first_ready or now, now - outcome.ready_s)
        if now - self.written > WRITE_EVERY_S:
            self.write()

    def show(
        self, progress: Progress, *, open_shards: Tally | None = None, working_s: float | None = None, note: str = ""
    ) -> None:
        """Show the shards that are written, and the rows of those that are not."""
        being_made = open_shards or Tally()
        progress.update(
            done=self.num_done + being_made.rows,
            already=self.already,
            failed=self.new_failed + being_made.failed,
            tokens=self.new_tokens + being_made.tokens,
            working_s=working_s,
            note=note,
        )

    def manifest(self) -> Manifest:
        """Return the manifest of the stage as it is now."""
        now, before = time.monotonic(), self.before
        busy = now - self.first_ready if self.first_ready else 0.0
        failed: Counter[str] = Counter()
        filtered: Counter[str] = Counter()
        unusable: Counter[str] = Counter()
        for shard in self.shards.values():
            failed.update(shard.failed)
            filtered.update(shard.filtered)
            unusable.update(shard.unusable)
        sums: dict[str, Any] = {field: sum(getattr(shard, field) for shard in self.shards.values()) for field in SUMS}
        return dataclasses.replace(
            before,
            status="running",
            failed=dict(failed),
            filtered=dict(filtered),
            unusable=dict(unusable),
            seconds=round(before.seconds + now - self.started, 1),
            busy_seconds=round(before.busy_seconds + busy, 1),
            num_workers=max(before.num_workers, len(self.nodes)),
            num_nodes=max(before.num_nodes, len(set(self.nodes.values()))),
            worker_seconds=round(before.worker_seconds + sum(self.ready_s.values()), 1),
            gpus_per_worker=self.gpus_per_worker,
            files=dict(sorted(self.files.items())),
            **sums,
        )

    def write(self) -> None:
        self.written = time.monotonic()
        write_manifest(self.stage.output, self.manifest())


class ProgressThread:
    """A thread that shows the rows of an attempt and its workers while the driver waits for shards.

    It ends the roster when the stage is over.
    """

    def __init__(self, attempt: Attempt, progress: Progress, roster: Any) -> None:
        self.attempt, self.progress, self.roster = attempt, progress, roster
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def update(self, workforce: Workforce) -> None:
        """Show the shards that are written, and what the workers report of those that are not."""
        self.attempt.show(
            self.progress,
            open_shards=workforce.open,
            working_s=workforce.ready_s,
            note=workers_in_words(workforce),
        )

    def _poll(self) -> None:
        import ray

        while not self.stop.wait(1.0):
            try:
                self.update(ray.get(self.roster.read.remote(), timeout=5))
            except ray.exceptions.RayError:  # its node was lost, and it starts again elsewhere
                continue

    def __enter__(self) -> ProgressThread:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        self.stop.set()
        self.thread.join()
        first_ready = self.attempt.first_ready
        self.attempt.show(self.progress, working_s=time.monotonic() - first_ready if first_ready else None)
        ray.kill(self.roster)  # the data set holds it too, and would keep its process to the end of the run


def workers_in_words(workforce: Workforce) -> str:
    """Return what the progress line says of the workers: `2 workers on 2 nodes, 1 starting`, `no worker for 45 s`."""
    if workforce.silent_s is None:
        return "starting workers"
    if not workforce.num_ready and not workforce.num_starting:
        return f"no worker for {workforce.silent_s:.0f} s"
    fetched = f", {workforce.fetched / 1e9:.1f} GB of models fetched" if workforce.fetched >= 1e8 else ""
    if not workforce.num_ready:
        return f"starting {_number(workforce.num_starting, 'worker')}{fetched}"
    text = f"{_number(workforce.num_ready, 'worker')} on {_number(workforce.num_nodes, 'node')}"
    return text + (f", {workforce.num_starting} starting{fetched}" if workforce.num_starting else "")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
