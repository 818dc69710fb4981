"""One stage of a run: shards in, shards out, over a pool of Ray Data actors.

The first stage fixes the shards; every later one turns `shard-00007.parquet` of its source into `shard-00007.parquet`
of its own. A shard is the unit of resume: it appears whole or not at all, with a receipt in its footer that accounts
for every row of its source: written, filtered or failed. So no row can be written twice or lost, and a shard whose
source has grown (failed rows of the stage before were retried) is completed by what it lacks. Inside an actor the rows
of several shards run concurrently, so an engine's batch stays full and a slow row delays its own shard only.

    proposals/shard-00007.parquet -> [actor: worker.process(row) for each row] -> scores/shard-00007.parquet
                                                                 failures -> scores/failed/shard-00007.jsonl
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
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
from aft_ray.templates.control import without_surrogates

logger = logging.getLogger(__name__)

RECEIPT = b"aft_ray.receipt"
"""Key in a shard's Parquet footer: what making it cost, so that totals survive any number of resumes."""


@dataclass(frozen=True, kw_only=True)
class Processed:
    """The rows made from one row (usually one), and the tokens that took."""

    rows: list[dict[str, Any]]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    """What a remote endpoint charged for these tokens."""
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
    """What making one shard took, and where each row of its source went that is not in it."""

    rows_in: int
    rows_out: int
    failed: Mapping[str, Mapping[str, str]]
    """prompt_id -> {error, message}"""
    filtered: Mapping[str, str]
    """prompt_id -> reason"""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float


def run_stage(
    stage: Stage,
    *,
    max_failure_rate: float,
    retry_failed: bool = False,
    connect: Callable[[], None] = lambda: None,
) -> Manifest:
    """Make what `stage.output` lacks of `stage.source`; return the finished manifest.

    With `retry_failed`, rows that failed before are tried again. `connect` is called before Ray is needed, and not at
    all when nothing is left to make. Raises ResumeRefused (other settings), InputError (no source), TooManyFailures,
    ConfigError (a worker no node can hold), or what a worker raised when it could not be built.
    """
    source = read_manifest(stage.source)
    if source is None or source.status != "done":
        raise InputError(f"{stage.source.path}: not finished, and '{stage.name}' is made from it. Run that stage first")
    manifest = begin(stage.output, stage.name, {**stage.settings, "source": source.fingerprint})
    is_complete = manifest.status == "done" and manifest.rows_in == source.rows_out
    if is_complete and not (retry_failed and manifest.num_failed):
        return manifest
    manifest = dataclasses.replace(manifest, status="running")
    write_manifest(stage.output, manifest)
    todo, num_rows_done = _todo(stage, retry_failed)
    started = time.monotonic()
    if todo:
        connect()
        busy = 0.0
        try:
            busy = _make_shards(stage, todo, num_rows_done, source.rows_out, max_failure_rate, retry_failed)
        finally:
            manifest = dataclasses.replace(
                manifest,
                seconds=round(manifest.seconds + time.monotonic() - started, 1),
                busy_seconds=round(manifest.busy_seconds + busy, 1),
            )
            write_manifest(stage.output, manifest)
    return _finish(stage, manifest, max_failure_rate)


def _todo(stage: Stage, retry_failed: bool) -> tuple[list[str], int]:
    """The shards that lack rows, and how many rows need no work."""
    there = set(stage.output.names(".parquet"))
    todo, num_rows_done = [], 0
    for name in stage.source.names(".parquet"):
        if name not in there:
            todo.append(name)
            continue
        receipt = read_receipt(stage.output, name)
        num_retried = len(receipt.failed) if retry_failed else 0
        num_rows_done += receipt.rows_in - num_retried
        if num_retried or receipt.rows_in < stage.source.num_rows(name):
            todo.append(name)
    return todo, num_rows_done


def write_first_shards(
    folder: Folder, rows: Iterator[dict[str, Any]], schema: pa.Schema, rows_per_shard: int | None
) -> int:
    """Write the shards every later stage keeps to; returns the number of rows."""
    num_rows, rows = 0, iter(rows)
    for number, size in enumerate(shard_sizes(rows_per_shard)):
        shard = list(itertools.islice(rows, size))
        if not shard:
            break
        folder.write_table(shard_name(number), pa.Table.from_pylist(shard, schema=schema))
        num_rows += len(shard)
    return num_rows


def shard_sizes(rows_per_shard: int | None) -> Iterator[int]:
    """Rows of each shard. None: 16 shards of 8 rows, 16 of 16, ... then 512 for ever: 2,033 files for a million rows,
    and in a smaller run no shard so large that the others wait for it.
    """
    if rows_per_shard is None:
        for size in (8, 16, 32, 64, 128, 256):
            yield from itertools.repeat(size, 16)
    yield from itertools.repeat(rows_per_shard or 512)


def shard_name(number: int) -> str:
    """`shard-00007.parquet`: sorted by name is sorted by number."""
    return f"shard-{number:05d}.parquet"


def finish_without_source(folder: Folder, manifest: Manifest, rows_in: int, rows_out: int) -> Manifest:
    """The finished manifest of a stage that reads no other stage (prompts)."""
    files = {name: folder.sha256(name) for name in folder.names(".parquet")}
    done = dataclasses.replace(manifest, status="done", rows_in=rows_in, rows_out=rows_out, files=files)
    write_manifest(folder, done)
    return done


def _make_shards(
    stage: Stage, shards: list[str], num_rows_done: int, num_rows: int, max_failure_rate: float, retry_failed: bool
) -> float:
    """Run the named shards through a pool of actors, with progress; returns the seconds a worker was ready.

    Every shard writes itself.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _check_placement(stage)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    on_this_node: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}  # outlives the loss of other nodes
    counter: Any = ray.remote(**on_this_node)(_Counter).remote()
    dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    in_flight = stage.placement.max_shards_in_flight
    receipts = dataset.map(
        _ShardActor,  # type: ignore[arg-type] # an async callable class is allowed
        fn_constructor_args=(stage, counter, retry_failed),
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
    with Progress(stage.name, total=num_rows) as progress, _Watch(counter, progress, num_rows_done) as watch:
        failed = 0
        for receipt in receipts.iter_rows():
            if receipt["error"]:
                raise getattr(errors, receipt["error"])(f"{stage.name}: {receipt['message']}")
            failed += receipt["num_failed"]
            if failed > max_failure_rate * num_rows:
                break  # _finish counts exactly and stops the run
        return watch.look()


class _Watch:
    """Copies the actors' counts into the progress line, from a thread, while the driver waits for shards."""

    def __init__(self, counter: Any, progress: Progress, already: int) -> None:
        self.counter, self.progress, self.already = counter, progress, already
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._poll, daemon=True)

    def look(self) -> float:
        import ray

        counts = ray.get(self.counter.read.remote())
        note = "" if counts["ready"] else "starting workers"
        done = counts["rows"] + self.already
        self.progress.update(done=done, failed=counts["failed"], tokens=counts["tokens"], note=note)
        return float(counts["busy_seconds"])

    def _poll(self) -> None:
        while not self.stop.wait(1.0):
            self.look()

    def __enter__(self) -> _Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def _check_placement(stage: Stage) -> None:
    """A worker no node can hold would wait for ever: say so instead (a cluster that autoscales may still grow)."""
    import ray

    placement = stage.placement
    wanted = {"CPU": placement.num_cpus, "GPU": placement.num_gpus}
    if placement.accelerator_type is not None:
        wanted[f"{ACCELERATOR}{placement.accelerator_type}"] = 0.001  # what Ray asks of the label
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = any(all(has.get(name, 0) >= amount for name, amount in wanted.items()) for has in nodes)
    if not fits and not any(has.get("aft_autoscaling") for has in nodes):
        raise ConfigError(
            f"{stage.name}.placement asks {_shown(wanted)} per worker, and no node has that. "
            f"The nodes have: {'; '.join(sorted(map(_shown, nodes)))}. Ask for less or use a larger cluster"
        )


ACCELERATOR = "accelerator_type:"


def _shown(resources: Mapping[str, float]) -> str:
    """`4 CPU, 2 GPU, H100`"""
    amounts = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return ", ".join([*amounts, *(name.removeprefix(ACCELERATOR) for name in resources if ACCELERATOR in name)])


class _Counter:
    """Counts finished rows over all actors of a stage, for the progress line only."""

    def __init__(self) -> None:
        self.counts = {"rows": 0, "failed": 0, "tokens": 0, "ready": 0}
        self.first_ready: float | None = None

    def add(self, rows: int, failed: int, tokens: int) -> None:
        self.counts["rows"] += rows
        self.counts["failed"] += failed
        self.counts["tokens"] += tokens

    def ready(self) -> None:
        self.counts["ready"] += 1
        self.first_ready = self.first_ready or time.monotonic()

    def read(self) -> dict[str, float]:
        busy = time.monotonic() - self.first_ready if self.first_ready else 0.0
        return {**self.counts, "busy_seconds": busy}


class _ShardActor:
    """Holds one worker and makes shards with it, several at a time on one event loop."""

    def __init__(self, stage: Stage, counter: Any, retry_failed: bool) -> None:
        self.stage, self.counter, self.retry_failed = stage, counter, retry_failed
        self.worker: RowWorker | None = None
        self.building = asyncio.Lock()

    async def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            worker = await self._worker()
            receipt = await make_shard(self.stage, item["shard"], worker, self._count, self.retry_failed)
        except AftError as error:  # told as data: Ray would wrap it in pages of its own traceback
            return {"num_failed": 0, "error": type(error).__name__, "message": str(error)}
        return {"num_failed": len(receipt.failed), "error": "", "message": ""}

    async def _worker(self) -> RowWorker:
        async with self.building:
            if self.worker is None:
                self.worker = self.stage.worker()
                self.counter.ready.remote()
            return self.worker

    def _count(self, failed: int, tokens: int) -> None:
        self.counter.add.remote(1, failed, tokens)


async def make_shard(
    stage: Stage,
    name: str,
    worker: RowWorker,
    count: Callable[[int, int], None] = lambda failed, tokens: None,
    retry_failed: bool = False,
) -> Receipt:
    """Turn what an output shard lacks of its source shard into rows: concurrently, order kept, failures as data."""
    source = stage.source.read_table(name).to_pylist()
    before = read_receipt(stage.output, name) if stage.output.exists(name) else NOTHING
    kept = stage.output.read_table(name).to_pylist() if before.rows_in else []
    failed = {} if retry_failed else dict(before.failed)
    accounted = {row["prompt_id"] for row in kept} | failed.keys() | before.filtered.keys()

    async def one(row: dict[str, Any]) -> Processed | dict[str, str]:
        try:
            done = await worker.process(row)
        except ConfigError:  # a missing package, a wrong setting: so it is for every row
            raise
        except Exception as error:  # a failed row is data: it keeps its id and a reason
            failure = _failure(error)
            logger.warning("%s: %s failed: %s: %s", stage.name, row["prompt_id"], *failure.values())
            count(1, 0)
            return failure
        count(0, done.completion_tokens)
        return done

    todo = [row for row in source if row["prompt_id"] not in accounted]
    results = dict(zip((row["prompt_id"] for row in todo), await asyncio.gather(*map(one, todo)), strict=True))
    results = _writable(results, stage.schema)
    new_failures = {key: result for key, result in results.items() if isinstance(result, dict)}
    if new_failures:
        await worker.check()
    made = {key: result for key, result in results.items() if isinstance(result, Processed)}
    rows: dict[str, list[dict[str, Any]]] = {row["prompt_id"]: [] for row in source}
    for row in kept:
        rows[row["prompt_id"]].append(row)
    for key, result in made.items():
        rows[key] = result.rows
    receipt = Receipt(
        rows_in=len(source),
        rows_out=sum(map(len, rows.values())),
        failed={**failed, **new_failures},
        filtered={**before.filtered, **{key: result.filtered for key, result in made.items() if result.filtered}},
        prompt_tokens=before.prompt_tokens + sum(result.prompt_tokens for result in made.values()),
        completion_tokens=before.completion_tokens + sum(result.completion_tokens for result in made.values()),
        cost_usd=before.cost_usd + sum(result.cost_usd for result in made.values()),
    )
    table = pa.Table.from_pylist([row for some in rows.values() for row in some], schema=stage.schema)
    stage.output.write_table(name, table.replace_schema_metadata({RECEIPT: json.dumps(dataclasses.asdict(receipt))}))
    _list_failures(stage, name, receipt)
    return receipt


def _failure(error: Exception) -> dict[str, str]:
    """What is kept of an error, fit to be written: Ray ends a worker whose log line holds half a character."""
    return {"error": type(error).__name__, "message": without_surrogates(str(error))[:2000]}


def _writable(results: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The results, with those as failures whose rows no file can hold: half a character, a number beyond its column."""

    def why_not(rows: list[dict[str, Any]]) -> Exception | None:
        try:
            pa.Table.from_pylist(rows, schema=schema)
        except (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError) as error:
            return error
        return None

    made = {key: result.rows for key, result in results.items() if isinstance(result, Processed)}
    if why_not([row for rows in made.values() for row in rows]) is None:
        return results
    errors_by_key = {key: error for key, rows in made.items() if (error := why_not(rows)) is not None}
    return results | {key: _failure(error) for key, error in errors_by_key.items()}


NOTHING = Receipt(rows_in=0, rows_out=0, failed={}, filtered={}, prompt_tokens=0, completion_tokens=0, cost_usd=0.0)


def _list_failures(stage: Stage, name: str, receipt: Receipt) -> None:
    """Write a shard's failed rows where people look for them. The receipt is the truth; this is a copy for reading."""
    folder, file = stage.output.child("failed"), name.replace(".parquet", ".jsonl")
    lines = [{"prompt_id": key, "stage": stage.name, **why} for key, why in receipt.failed.items()]
    if lines:
        folder.write_bytes(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    elif folder.exists(file):
        folder.remove(file)


def read_receipt(folder: Folder, name: str) -> Receipt:
    """What making a shard took, from the shard itself."""
    return Receipt(**json.loads(folder.read_metadata(name)[RECEIPT]))


def _finish(stage: Stage, manifest: Manifest, max_failure_rate: float) -> Manifest:
    names = stage.output.names(".parquet")
    failed: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    first_failure = ""
    totals: dict[str, Any] = dict.fromkeys(TOTALS, 0)
    for name in names:
        receipt = read_receipt(stage.output, name)
        _list_failures(stage, name, receipt)  # again: a kill may have come between the shard and its list
        failed.update(why["error"] for why in receipt.failed.values())
        first_failure = first_failure or next((why["message"] for why in receipt.failed.values()), "")
        filtered.update(receipt.filtered.values())
        totals = {field: total + getattr(receipt, field) for field, total in totals.items()}
    manifest = dataclasses.replace(manifest, failed=dict(failed), filtered=dict(filtered), **totals)
    if manifest.num_failed > max_failure_rate * manifest.rows_in:
        write_manifest(stage.output, manifest)
        reasons = ", ".join(f"{count} {error}" for error, count in failed.most_common())
        raise TooManyFailures(
            f"{stage.name}: {manifest.num_failed} of {manifest.rows_in} rows failed ({reasons}), more than "
            f"run.max_failure_rate {max_failure_rate:g} allows. The first: {first_failure}. Reasons by row: "
            f"{stage.output.path}/failed; to try these rows again: aft-ray run --retry-failed"
        )
    manifest = dataclasses.replace(manifest, status="done", files={name: stage.output.sha256(name) for name in names})
    write_manifest(stage.output, manifest)
    return manifest


TOTALS = ("rows_in", "rows_out", "prompt_tokens", "completion_tokens", "cost_usd")
"""Fields of a receipt that add up to the manifest's."""
