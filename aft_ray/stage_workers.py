"""The processes of a stage: each holds one row worker, makes shards with it, and says once a second how it goes.

    ShardActor   an actor of the pool. It makes several shards at a time on one event loop, and builds a new worker
                 where an engine died
    Roster       one actor per stage. It keeps the last report of every ShardActor, for the progress line

Nothing but the progress line depends on reports. What a stage has made is in the receipts of its shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from aft_ray import metrics
from aft_ray.errors import AftError, EngineDead, EngineError
from aft_ray.models import fetched_bytes
from aft_ray.shards import RowWorker, ShardSummary, Stage, Tally, make_shard

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
SILENT_AFTER_S = 10.0
"""A worker that has not reported for so long is taken for dead."""
MAX_DEATHS = 3
"""Deaths of a worker's engines without a finished shard in between, after which the stage stops."""
CLOSE_WITHIN_S = 25.0
"""Ray waits 30 s for an actor that ends by itself."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an actor returns for a shard: its summary, or the error that must stop the stage."""

    made: ShardSummary | AftError
    worker: str
    """Id of the process that made the shard."""
    node: str
    ready_s: float
    """Seconds since its worker was ready for the first time."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one ShardActor is doing now."""

    worker: str
    node: str
    ready_s: float | None
    """Seconds since its worker was ready; None while it is being built."""
    open: Tally
    """The rows of shards that are not written yet."""
    fetched: int = 0
    """Bytes of models that came to its node since this worker began to be built; 0 when it is ready."""
    is_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Workforce:
    """The workers of a stage as their reports show them."""

    num_ready: int
    num_starting: int
    num_nodes: int
    """Number of nodes with a worker that is ready."""
    silent_s: float | None
    """Seconds since the last report of any worker; None before the first one."""
    ready_s: float
    """Seconds since a worker was ready for the first time."""
    fetched: int
    """Bytes of models that came to the nodes of workers that are starting."""
    open: Tally


class Roster:
    """An actor that keeps the last report of every worker. If its node is lost it starts again, empty."""

    def __init__(self) -> None:
        self.reports: dict[str, tuple[float, Report]] = {}
        self.last_report: float | None = None
        self.first_ready: float | None = None

    def report(self, report: Report) -> None:
        self.last_report = now = time.monotonic()
        self.reports[report.worker] = (now, report)
        if report.is_last:
            del self.reports[report.worker]
        if report.ready_s is not None:
            self.first_ready = min(self.first_ready or now, now - report.ready_s)

    def read(self) -> Workforce:
        now = time.monotonic()
        live = [report for heard, report in self.reports.values() if now - heard < SILENT_AFTER_S]
        ready = [report for report in live if report.ready_s is not None]
        fetched: dict[str, int] = {}
        for report in live:
            fetched[report.node] = max(fetched.get(report.node, 0), report.fetched)
        return Workforce(
            num_ready=len(ready),
            num_starting=len(live) - len(ready),
            num_nodes=len({report.node for report in ready}),
            silent_s=None if self.last_report is None else now - self.last_report,
            ready_s=now - self.first_ready if self.first_ready else 0.0,
            fetched=sum(fetched.values()),
            open=total(report.open for report in live),
        )


def total(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of tallies."""
    summed = Tally()
    for tally in tallies:
        summed.rows += tally.rows
        summed.failed += tally.failed
        summed.tokens += tally.tokens
    return summed


class _Reporter:
    """A thread that reports to the roster, also while the event loop is busy with building a worker."""

    def __init__(self, roster: Any, open_shards: dict[str, Tally]) -> None:
        import ray

        self.roster, self.open_shards = roster, open_shards
        self.worker, self.node = uuid4().hex, ray.get_runtime_context().get_node_id()
        self.began = time.time()
        self.ready_at: float | None = None
        self.stop = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def ready_s(self) -> float | None:
        return None if self.ready_at is None else time.monotonic() - self.ready_at

    def send(self, fetched: int = 0, is_last: bool = False) -> None:
        tally = total(self.open_shards.copy().values())
        report = Report(
            worker=self.worker, node=self.node, ready_s=self.ready_s, open=tally, fetched=fetched, is_last=is_last
        )
        self.roster.report.remote(report)

    def _run(self) -> None:
        self.send()
        while not self.stop.wait(REPORT_EVERY_S):
            self.send(fetched=fetched_bytes(self.began) if self.ready_at is None else 0)


class ShardActor:
    """An actor that holds one worker and makes several shards at a time with it, on one event loop."""

    def __init__(self, stage: Stage, roster: Any, retry_failed: bool) -> None:
        self.stage, self.retry_failed = stage, retry_failed
        self.open_shards: dict[str, Tally] = {}
        self.reporter = _Reporter(roster, self.open_shards)
        self.worker: RowWorker | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.building = asyncio.Lock()
        self.num_deaths = 0
        self.given_up: EngineError | None = None

    async def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return a pickled Outcome. Errors are data: Ray would wrap them in pages of its own traceback."""
        tally = self.open_shards[item["shard"]] = Tally()
        made: ShardSummary | AftError
        try:
            worker = await self._current()
            with counted(self.stage, tally):
                made = await make_shard(
                    self.stage,
                    item["shard"],
                    worker,
                    tally=tally,
                    replace=self._replace,
                    retry_failed=self.retry_failed,
                )
            self.num_deaths = 0
        except AftError as error:
            made = error
        finally:
            del self.open_shards[item["shard"]]
        outcome = Outcome(
            made=made,
            worker=self.reporter.worker,
            node=self.reporter.node,
            ready_s=self.reporter.ready_s or 0.0,
        )
        return {"outcome": pickle.dumps(outcome)}

    async def _current(self) -> RowWorker:
        async with self.building:
            return self._built()

    async def _replace(self, dead: RowWorker, error: EngineDead) -> RowWorker:
        """Return the worker that stands in for one whose engine died; of several shards that ask, the first builds it.

        Raises EngineError after `MAX_DEATHS` of them.
        """
        async with self.building:
            if self.worker is dead:
                self.num_deaths += 1
                metrics.count_engine_death(self.stage.run, self.stage.name)
                where = {"run": self.stage.run, "stage": self.stage.name}
                logger.warning("%s: the engine died (%d): %s", self.stage.name, self.num_deaths, error, extra=where)
                await closed(dead)
                self.worker = None
                if self.num_deaths == MAX_DEATHS:
                    self.given_up = EngineError(
                        f"the engine died {MAX_DEATHS} times without a finished shard in between; at last: {error}"
                    )
            return self._built()

    def _built(self) -> RowWorker:
        if self.given_up is not None:
            raise self.given_up
        if self.worker is None:
            self.loop = asyncio.get_running_loop()
            self.worker = build(self.stage)
            self.reporter.ready_at = self.reporter.ready_at or time.monotonic()
        return self.worker

    def __del__(self) -> None:
        """Close the worker. Ray Data drops this object, in another thread, when the actor has no more work."""
        self.reporter.stop.set()
        if self.worker is not None and self.loop is not None:
            asyncio.run_coroutine_threadsafe(closed(self.worker), self.loop).result(CLOSE_WITHIN_S)
        self.reporter.send(is_last=True)


def build(stage: Stage) -> RowWorker:
    """Return a new worker of a stage. Raises EngineError where that fails in a library."""
    began = time.monotonic()
    try:
        worker = stage.worker()
    except AftError:
        raise
    except Exception as error:  # process boundary: libraries load a model here
        where = {"run": stage.run, "stage": stage.name}
        logger.exception("%s: a worker could not be built", stage.name, extra=where)
        raise EngineError(f"a worker could not be built: {type(error).__name__}: {error}") from error
    metrics.count_worker(stage.run, stage.name, seconds=time.monotonic() - began)
    return worker


@contextlib.contextmanager
def counted(stage: Stage, tally: Tally) -> Iterator[None]:
    """Count a shard that is made inside, unless that fails."""
    began = time.monotonic()
    yield
    metrics.count_shard(
        stage.run,
        stage.name,
        num_ok=tally.rows - tally.failed,
        num_failed=tally.failed,
        num_tokens=tally.tokens,
        seconds=time.monotonic() - began,
    )


async def closed(worker: RowWorker) -> None:
    """Close a worker. What goes wrong with it then concerns nobody but the log."""
    try:
        async with asyncio.timeout(CLOSE_WITHIN_S):
            await worker.close()
    except Exception:  # process boundary: the engine may be half dead
        logger.warning("a worker could not be closed", exc_info=True)
