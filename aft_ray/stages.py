"""One stage of a run: shards in, shards out, over a pool of Ray Data actors.

The first stage fixes the shards; every later one turns `shard-00007.parquet` of its source into `shard-00007.parquet`
of its own. A shard is the unit of resume: it appears whole or not at all, so the shards that are there are the ones
that are done, and no row can be written twice or lost. Inside an actor the rows of several shards run concurrently,
so an engine's batch stays full and a slow row delays its own shard only.

    proposals/shard-00007.parquet -> [actor: worker.process(row) for each row] -> scores/shard-00007.parquet
                                                                 failures -> scores/failed/shard-00007.jsonl
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from aft_ray import errors
from aft_ray.config import PlacementConfig
from aft_ray.errors import AftError, ConfigError, InputError, TooManyFailures
from aft_ray.progress import Progress
from aft_ray.runs import Manifest, begin, read_manifest, write_manifest
from aft_ray.storage import Folder

logger = logging.getLogger(__name__)

RECEIPT = b"aft_ray.receipt"
"""Key in a shard's Parquet footer: what making it cost, so that totals survive any number of resumes."""


@dataclass(frozen=True, kw_only=True)
class Processed:
    """The rows made from one row (usually one), and the tokens that took."""

    rows: list[dict[str, Any]]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    filtered: str | None = None
    """Why no row was made on purpose; counted, not a failure."""


class RowWorker(Protocol):
    """What a stage does to a row. Built once in each actor, inside its event loop."""

    async def process(self, row: dict[str, Any]) -> Processed:
        """Raise to fail this row alone: it goes to failed/ with the error's class and message."""
        ...

    async def check(self) -> None:
        """Raise when the worker itself is broken (its engine died), so that rows are not blamed for it."""
        return None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything that decides one stage."""

    name: str
    source: Folder
    output: Folder
    schema: pa.Schema
    settings: Mapping[str, Any]
    """What decides the content: the stage's fingerprint is made from it and the source's."""
    worker: Callable[[], RowWorker]
    """Builds the worker; must pickle."""
    placement: PlacementConfig


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What making one shard took."""

    rows_in: int
    rows_out: int
    failed: Mapping[str, int]
    filtered: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int


def run_stage(stage: Stage, *, max_failure_rate: float, connect: Callable[[], None] = lambda: None) -> Manifest:
    """Make every shard of `stage.source` that `stage.output` lacks; return the finished manifest.

    `connect` is called before Ray is needed, and not at all when nothing is left to make. Raises ResumeRefused (other
    settings), InputError (no source), TooManyFailures, ConfigError (a worker no node can hold), or what a worker raised
    when it could not be built.
    """
    source = read_manifest(stage.source)
    if source is None or source.status != "done":
        raise InputError(f"{stage.source.path}: not finished, and '{stage.name}' is made from it. Run that stage first")
    manifest = begin(stage.output, stage.name, {**stage.settings, "source": source.fingerprint})
    if manifest.status == "done":
        return manifest
    write_manifest(stage.output, manifest)
    shards = stage.source.names(".parquet")
    done = set(stage.output.names(".parquet"))
    started = time.monotonic()
    connect()
    try:
        _make_shards(stage, [s for s in shards if s not in done], len(done), source.rows_out, max_failure_rate)
    finally:
        manifest = dataclasses.replace(manifest, seconds=round(manifest.seconds + time.monotonic() - started, 1))
        write_manifest(stage.output, manifest)
    return _finish(stage, manifest, max_failure_rate)


def write_first_shards(folder: Folder, rows: Iterator[dict[str, Any]], schema: pa.Schema, rows_per_shard: int) -> int:
    """Write the shards every later stage keeps to; returns the number of rows."""
    num_rows, shard = 0, []
    for row in rows:
        shard.append(row)
        if len(shard) == rows_per_shard:
            folder.write_table(shard_name(num_rows // rows_per_shard), pa.Table.from_pylist(shard, schema=schema))
            num_rows += len(shard)
            shard = []
    if shard:
        folder.write_table(shard_name(num_rows // rows_per_shard), pa.Table.from_pylist(shard, schema=schema))
    return num_rows + len(shard)


def shard_name(number: int) -> str:
    """`shard-00007.parquet`: sorted by name is sorted by number."""
    return f"shard-{number:05d}.parquet"


def finish_without_source(folder: Folder, manifest: Manifest, rows_in: int, rows_out: int) -> Manifest:
    """The finished manifest of a stage that reads no other stage (prompts)."""
    files = {name: folder.sha256(name) for name in folder.names(".parquet")}
    done = dataclasses.replace(manifest, status="done", rows_in=rows_in, rows_out=rows_out, files=files)
    write_manifest(folder, done)
    return done


def _make_shards(stage: Stage, shards: list[str], num_done: int, num_rows: int, max_failure_rate: float) -> None:
    import ray

    if not shards:
        return
    _check_placement(stage)
    counter: Any = ray.remote(num_cpus=0)(_Counter).remote()
    dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    in_flight = stage.placement.max_shards_in_flight
    receipts = dataset.map(
        _ShardActor,  # type: ignore[arg-type] # an async callable class is allowed
        fn_constructor_args=(stage, counter),
        compute=ray.data.ActorPoolStrategy(
            min_size=min(stage.placement.min_actors, len(shards)),
            max_size=min(stage.placement.max_actors, len(shards)),
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
        ),
        num_cpus=stage.placement.num_cpus,
        num_gpus=stage.placement.num_gpus or None,
        accelerator_type=stage.placement.accelerator_type,
    )
    already = _rows_in(stage, num_done)
    with Progress(stage.name, total=num_rows) as progress, _Watch(counter, progress, already) as watch:
        failed = 0
        for receipt in receipts.iter_rows():
            if receipt["error"]:
                raise getattr(errors, receipt["error"])(f"{stage.name}: {receipt['message']}")
            failed += receipt["num_failed"]
            if failed > max_failure_rate * num_rows:
                break  # _finish counts exactly and stops the run
        watch.look()


class _Watch:
    """Copies the actors' counts into the progress line, from a thread, while the driver waits for shards."""

    def __init__(self, counter: Any, progress: Progress, already: int) -> None:
        self.counter, self.progress, self.already = counter, progress, already
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def look(self) -> None:
        import ray

        counts = ray.get(self.counter.read.remote())
        note = "" if counts["ready"] else "starting workers"
        done = counts["rows"] + self.already
        self.progress.update(done=done, failed=counts["failed"], tokens=counts["tokens"], note=note)

    def _poll(self) -> None:
        while not self.stop.wait(1.0):
            self.look()

    def __enter__(self) -> _Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def _rows_in(stage: Stage, num_done: int) -> int:
    if not num_done:
        return 0
    return sum(read_receipt(stage.output, name).rows_in for name in stage.output.names(".parquet"))


def _check_placement(stage: Stage) -> None:
    """An actor no node can hold would wait for ever: say so instead (a cluster that autoscales may still grow)."""
    import ray

    has = ray.cluster_resources()
    for name, wanted in (("CPU", stage.placement.num_cpus), ("GPU", stage.placement.num_gpus)):
        if wanted > has.get(name, 0) and not has.get("aft_autoscaling"):
            raise ConfigError(
                f"{stage.name}.placement asks {wanted:g} {name} per worker and the cluster has {has.get(name, 0):g}. "
                f"Lower num_{name.lower()}s or use a larger cluster"
            )


class _Counter:
    """Counts finished rows over all actors of a stage, for the progress line only."""

    def __init__(self) -> None:
        self.counts = {"rows": 0, "failed": 0, "tokens": 0, "ready": 0}

    def add(self, rows: int, failed: int, tokens: int) -> None:
        self.counts["rows"] += rows
        self.counts["failed"] += failed
        self.counts["tokens"] += tokens

    def ready(self) -> None:
        self.counts["ready"] += 1

    def read(self) -> dict[str, int]:
        return dict(self.counts)


class _ShardActor:
    """Holds one worker and makes shards with it, several at a time on one event loop."""

    def __init__(self, stage: Stage, counter: Any) -> None:
        self.stage, self.counter = stage, counter
        self.worker: RowWorker | None = None
        self.building = asyncio.Lock()

    async def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            worker = await self._worker()
            receipt = await make_shard(self.stage, item["shard"], worker, self._count)
        except AftError as error:  # told as data: Ray would wrap it in pages of its own traceback
            return {"num_failed": 0, "error": type(error).__name__, "message": str(error)}
        return {"num_failed": sum(receipt.failed.values()), "error": "", "message": ""}

    async def _worker(self) -> RowWorker:
        async with self.building:
            if self.worker is None:
                self.worker = self.stage.worker()
                self.counter.ready.remote()
            return self.worker

    def _count(self, failed: int, tokens: int) -> None:
        self.counter.add.remote(1, failed, tokens)


async def make_shard(
    stage: Stage, name: str, worker: RowWorker, count: Callable[[int, int], None] = lambda failed, tokens: None
) -> Receipt:
    """Turn one source shard into one output shard: rows concurrently, order kept, failures written aside."""
    rows = stage.source.read_table(name).to_pylist()

    async def one(row: dict[str, Any]) -> Processed | dict[str, Any]:
        try:
            done = await worker.process(row)
        except Exception as error:  # a failed row is data: it keeps its id and a reason
            logger.warning("%s: %s failed: %s: %s", stage.name, row["prompt_id"], type(error).__name__, error)
            count(1, 0)
            return {
                "prompt_id": row["prompt_id"],
                "stage": stage.name,
                "error": type(error).__name__,
                "message": str(error)[:2000],
            }
        count(0, done.completion_tokens)
        return done

    results = await asyncio.gather(*(one(row) for row in rows))
    failures = [result for result in results if isinstance(result, dict)]
    if failures:
        await worker.check()
        lines = "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures)
        stage.output.child("failed").write_bytes(name.replace(".parquet", ".jsonl"), lines.encode())
    made = [result for result in results if isinstance(result, Processed)]
    receipt = Receipt(
        rows_in=len(rows),
        rows_out=sum(len(result.rows) for result in made),
        failed=dict(Counter(failure["error"] for failure in failures)),
        filtered=dict(Counter(result.filtered for result in made if result.filtered)),
        prompt_tokens=sum(result.prompt_tokens for result in made),
        completion_tokens=sum(result.completion_tokens for result in made),
    )
    table = pa.Table.from_pylist([row for result in made for row in result.rows], schema=stage.schema)
    stage.output.write_table(name, table.replace_schema_metadata({RECEIPT: json.dumps(dataclasses.asdict(receipt))}))
    return receipt


def read_receipt(folder: Folder, name: str) -> Receipt:
    """What making a shard took, from the shard itself."""
    return Receipt(**json.loads(folder.read_metadata(name)[RECEIPT]))


def _finish(stage: Stage, manifest: Manifest, max_failure_rate: float) -> Manifest:
    names = stage.output.names(".parquet")
    receipts = [read_receipt(stage.output, name) for name in names]
    failed: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    for receipt in receipts:
        failed.update(receipt.failed)
        filtered.update(receipt.filtered)
    manifest = dataclasses.replace(
        manifest,
        rows_in=sum(receipt.rows_in for receipt in receipts),
        rows_out=sum(receipt.rows_out for receipt in receipts),
        failed=dict(failed),
        filtered=dict(filtered),
        prompt_tokens=sum(receipt.prompt_tokens for receipt in receipts),
        completion_tokens=sum(receipt.completion_tokens for receipt in receipts),
    )
    if manifest.num_failed > max_failure_rate * manifest.rows_in:
        write_manifest(stage.output, manifest)
        reasons = ", ".join(f"{count} {error}" for error, count in failed.most_common())
        raise TooManyFailures(
            f"{stage.name}: {manifest.num_failed} of {manifest.rows_in} rows failed ({reasons}), more than "
            f"run.max_failure_rate {max_failure_rate:g} allows. Reasons by row: {stage.output.path}/failed"
        )
    manifest = dataclasses.replace(manifest, status="done", files={name: stage.output.sha256(name) for name in names})
    write_manifest(stage.output, manifest)
    return manifest
