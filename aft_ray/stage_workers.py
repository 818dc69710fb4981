"""The processes of a stage: each holds one row worker, makes shards with it, and says once a second how it goes.

    ShardMaker   makes several shards at a time on one event loop, and builds a new worker where an engine died
    ShardActor   a ShardMaker in an actor of the pool
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

    def __init__(self, roster: Any, maker: ShardMaker) -> None:
        import ray

        self.roster, self.maker = roster, maker
        self.worker, self.node = uuid4().hex, ray.get_runtime_context().get_node_id()
        self.began = time.time()
        self.stop = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, fetched: int = 0, is_last: bool = False) -> None:
        report = Report(
            worker=self.worker,
            node=self.node,
            ready_s=self.maker.ready_s,
            open=self.maker.open,
            fetched=fetched,
            is_last=is_last,
        )
        self.roster.report.remote(report)

    def _run(self) -> None:
        self.send()
        while not self.stop.wait(REPORT_EVERY_S):
            self.send(fetched=fetched_bytes(self.began) if self.maker.ready_s is None else 0)


class ShardMaker:
    """One worker of a stage, which makes several shards at a time on one event loop."""

    def __init__(self, stage: Stage, retry_failed: bool) -> None:
        self.stage, self.retry_failed = stage, retry_failed
        self.worker: RowWorker | None = None
        self.building = asyncio.Lock()
        self.ready_at: float | None = None
        self.open_shards: dict[str, Tally] = {}
        self.num_deaths = 0
        self.given_up: EngineError | None = None

    @property
    def ready_s(self) -> float | None:
        """Seconds since the worker was ready for the first time."""
        return None if self.ready_at is None else time.monotonic() - self.ready_at

    @property
    def open(self) -> Tally:
        """The rows of shards that are not written yet."""
        return total(self.open_shards.copy().values())

    async def make(self, shard: str) -> ShardSummary:
        """Make a shard. Raises the AftError that must stop the stage."""
        tally = self.open_shards[shard] = Tally()
        try:
            worker = await self._current()
            with counted(self.stage, tally):
                made = await make_shard(
                    self.stage, shard, worker, tally=tally, replace=self._replace, retry_failed=self.retry_failed
                )
            self.num_deaths = 0
            return made
        finally:
            del self.open_shards[shard]

    async def close(self) -> None:
        if self.worker is not None:
            await closed(self.worker)

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
            self.worker = build(self.stage)
            self.ready_at = self.ready_at or time.monotonic()
        return self.worker


class ShardActor:
    """A `ShardMaker` in an actor of Ray Data."""

    def __init__(self, stage: Stage, roster: Any, retry_failed: bool) -> None:
        self.maker = ShardMaker(stage, retry_failed)
        self.reporter = _Reporter(roster, self.maker)
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return a pickled Outcome. Errors are data: Ray would wrap them in pages of its own traceback."""
        self.loop = asyncio.get_running_loop()
        made: ShardSummary | AftError
        try:
            made = await self.maker.make(item["shard"])
        except AftError as error:
            made = error
        outcome = Outcome(
            made=made,
            worker=self.reporter.worker,
            node=self.reporter.node,
            ready_s=self.maker.ready_s or 0.0,
        )
        return {"outcome": pickle.dumps(outcome)}

    def __del__(self) -> None:
        """Close the worker. Ray Data drops this object, in another thread, when the actor has no more work."""
        self.reporter.stop.set()
        if self.loop is not None:
            asyncio.run_coroutine_threadsafe(self.maker.close(), self.loop).result(CLOSE_WITHIN_S)
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
