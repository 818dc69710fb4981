"""A shard is the unit of work and of resume: one shard of a stage's source becomes one shard of its output.

The first stage fixes the shards; every later stage turns `shard-00007.parquet` of its source into
`shard-00007.parquet` of its output. An output shard appears whole or not at all, and the receipt in its footer accounts
for every row of its source: written, filtered or failed. So no row can be lost or written twice. When a source shard
has grown, because failed rows of the stage before were retried, only the missing rows are added to its output. The
receipt also has a digest of every row of the source, so that rows made from other rows are found and refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.config import PlacementConfig
from aft_ray.errors import ConfigError, EngineDead
from aft_ray.records import Spent, fingerprint
from aft_ray.storage import Folder
from aft_ray.templates.control import without_surrogates

logger = logging.getLogger(__name__)

RECEIPT = b"aft_ray.receipt"
"""Key of the receipt in the Parquet footer of a shard. Totals are sums of receipts, so they survive any resume."""


@dataclass(frozen=True, kw_only=True)
class Processed(Spent):
    """The rows made from one row, usually one, and what they cost."""

    rows: list[dict[str, Any]]
    filtered: str | None = None
    """Why the row was left out on purpose. It is counted, but is not a failure."""
    unusable: str | None = None
    """Why the row is written, but of no use to what follows: `truncated target`, or `no score: the reason`. A stage
    whose rows are all of no use stops."""


class RowWorker(ABC):
    """The work of a stage on one row. Each actor builds one worker, inside its event loop."""

    @abstractmethod
    async def process(self, row: dict[str, Any]) -> Processed:
        """Return the rows made from `row`. An exception fails this row alone; its class and message go to failed/.

        What an AftError says was `spent` is counted.
        """

    async def check(self) -> None:  # noqa: B027 (most workers have nothing that could break)
        """Raise when the worker itself is broken: then the rows that it failed do not count as failed.

        After EngineDead another worker is built in its place and makes these rows; any other error stops the stage.
        """

    async def close(self) -> None:  # noqa: B027
        """Free what the worker holds. It is called once, when the actor has no more work or the worker is replaced."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything that defines one stage."""

    name: str
    source: Folder
    output: Folder
    schema: pa.Schema
    settings: Mapping[str, Any]
    """The values that decide the content. With the fingerprint of the source they make the fingerprint of the stage."""
    worker: Callable[[], RowWorker]
    """Builds the worker. It is pickled."""
    placement: PlacementConfig
    must_yield: bool = False
    """Whether the stage stops where none of its rows is of use to what follows."""
    gpus: int = 0
    """Number of GPUs that a worker's model uses where the cluster has GPUs; `placement.num_gpus` wins over it."""
    run: str = ""
    """Name of the run, for metrics and logs."""
    is_light: bool = False
    """Whether a worker loads no model and computes little: a small stage is then made by the driver, which needs less
    time for it than an actor needs to start. What computes may be elsewhere, behind an endpoint."""


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The cost of one shard, and what became of each row of its source that is not in it."""

    rows_in: int
    rows_out: int
    failed: Mapping[str, Mapping[str, str]]
    """prompt_id -> {error, message}"""
    filtered: Mapping[str, str]
    """prompt_id -> reason"""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    num_estimated: int = 0
    """Number of answers whose tokens are an estimate."""
    unusable: Mapping[str, str] = field(default_factory=dict)
    """prompt_id -> reason, of rows that are in the shard and of no use"""
    source_sha256: str | None = None
    """sha256 of the file of the source; None in a receipt of an earlier version."""
    source_rows: Mapping[str, str] = field(default_factory=dict)
    """prompt_id -> digest of the row of the source"""


EMPTY_RECEIPT = Receipt(
    rows_in=0, rows_out=0, failed={}, filtered={}, prompt_tokens=0, completion_tokens=0, cost_usd=0.0
)


@dataclass(kw_only=True)
class Tally:
    """The rows of a shard that are made so far, for the progress of the stage."""

    rows: int = 0
    """Number of rows that are done, failed ones included."""
    failed: int = 0
    tokens: int = 0
    """Number of tokens that were generated for these rows."""


Failure = dict[str, str]
"""{error, message} of a row that failed."""
Replace = Callable[[RowWorker, EngineDead], Awaitable[RowWorker]]
"""Returns the worker that stands in for one whose engine died, or raises where there is none."""


async def _not_replaced(worker: RowWorker, error: EngineDead) -> RowWorker:
    raise error


async def make_shard(
    stage: Stage,
    name: str,
    worker: RowWorker,
    *,
    tally: Tally | None = None,
    replace: Replace = _not_replaced,
    retry_failed: bool = False,
) -> ShardSummary:
    """Make the rows that an output shard lacks, all at once; keep their order, and record failures in the receipt."""
    content = stage.source.read_bytes(name)
    source = pq.read_table(pa.BufferReader(content)).to_pylist()
    before = read_receipt(stage.output, name) if stage.output.exists(name) else EMPTY_RECEIPT
    kept = stage.output.read_table(name).replace_schema_metadata(None) if before.rows_in else stage.schema.empty_table()
    failed = {} if retry_failed else dict(before.failed)
    accounted = {*kept.column("prompt_id").to_pylist(), *failed, *before.filtered}
    todo = [row for row in source if row["prompt_id"] not in accounted]
    results, spent = await _process(stage, todo, worker, tally or Tally(), replace)
    table, results = _table(results, stage.schema)
    made = {key: result for key, result in results.items() if isinstance(result, Processed)}
    if kept.num_rows:
        table = _in_order(pa.concat_tables([kept, table]), [row["prompt_id"] for row in source])
    receipt = Receipt(
        rows_in=len(source),
        rows_out=table.num_rows,
        failed={**failed, **{key: result for key, result in results.items() if isinstance(result, dict)}},
        filtered={**before.filtered, **{key: result.filtered for key, result in made.items() if result.filtered}},
        prompt_tokens=before.prompt_tokens + spent.prompt_tokens,
        completion_tokens=before.completion_tokens + spent.completion_tokens,
        cost_usd=before.cost_usd + spent.cost_usd,
        num_estimated=before.num_estimated + spent.num_estimated,
        unusable={**before.unusable, **{key: result.unusable for key, result in made.items() if result.unusable}},
        source_sha256=hashlib.sha256(content).hexdigest(),
        source_rows=digests(source),
    )
    footer = {RECEIPT: json.dumps(dataclasses.asdict(receipt))}
    sha256 = stage.output.write_table(name, table.replace_schema_metadata(footer))
    list_failures(stage, name, receipt)
    return summary_of(name, receipt, sha256)


def digests(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return a digest of the content of every row by prompt_id."""
    return {row["prompt_id"]: fingerprint(row)[:16] for row in rows}


def changed_rows(source: Folder, name: str, receipt: Receipt) -> list[str]:
    """Return the prompt_ids of the rows that an output shard was made from and that its source no longer holds as they
    were. Rows that were added to the source do not count.
    """
    now = digests(source.read_table(name).to_pylist())
    return [key for key, digest in receipt.source_rows.items() if now.get(key) != digest]


async def _process(
    stage: Stage, rows: Sequence[dict[str, Any]], worker: RowWorker, tally: Tally, replace: Replace
) -> tuple[dict[str, Processed | Failure], Spent]:
    """Let the worker process every row. Returns what became of it by prompt_id, and what all of it cost.

    Where the engine died, the rows that failed are processed again by the worker that replaces it.
    """

    async def one(row: dict[str, Any]) -> Processed | Failure:
        try:
            done = await worker.process(row)
        except ConfigError:  # a missing package or a wrong setting would fail every row
            raise
        except Exception as error:  # a failed row is data: it keeps its id and a reason
            failure = _failure(error)
            costs.append(getattr(error, "spent", None) or Spent())
            where = {"run": stage.run, "stage": stage.name, "prompt_id": row["prompt_id"]}
            logger.warning("%s: %s failed: %s: %s", stage.name, row["prompt_id"], *failure.values(), extra=where)
            tally.failed += 1
            return failure
        finally:
            tally.rows += 1
        tally.tokens += done.completion_tokens
        costs.append(done)
        return done

    costs: list[Spent] = []
    results: dict[str, Processed | Failure] = {row["prompt_id"]: {} for row in rows}
    todo = rows
    while todo:
        results |= zip((row["prompt_id"] for row in todo), await asyncio.gather(*map(one, todo)), strict=True)
        todo = [row for row in todo if isinstance(results[row["prompt_id"]], dict)]
        if not todo:
            break
        try:
            await worker.check()
            break
        except EngineDead as error:
            worker = await replace(worker, error)
            tally.rows -= len(todo)
            tally.failed = 0
    return results, sum(costs, start=Spent())


def _failure(error: Exception) -> Failure:
    """Return the class and message of an error, without lone surrogates: Ray ends a worker that logs one."""
    return {"error": type(error).__name__, "message": without_surrogates(str(error))[:2000]}


def _table(
    results: dict[str, Processed | Failure], schema: pa.Schema
) -> tuple[pa.Table, dict[str, Processed | Failure]]:
    """Return the rows as a table, and the results with a failure where a row cannot be stored.

    A lone surrogate or a number out of range cannot, for example.
    """
    made = {key: result.rows for key, result in results.items() if isinstance(result, Processed)}
    try:
        return pa.Table.from_pylist([row for rows in made.values() for row in rows], schema=schema), results
    except UNWRITABLE:
        tables, failures = [], {}
        for key, rows in made.items():
            try:
                tables.append(pa.Table.from_pylist(rows, schema=schema))
            except UNWRITABLE as error:
                failures[key] = _failure(error)
        return pa.concat_tables(tables or [schema.empty_table()]), {**results, **failures}


UNWRITABLE = (pa.ArrowException, UnicodeError, OverflowError, TypeError, ValueError)
"""What pyarrow raises for a row that does not fit its schema."""


def _in_order(table: pa.Table, prompt_ids: Sequence[str]) -> pa.Table:
    """Return the rows in the order of the prompts they were made from."""
    places: dict[str, list[int]] = {key: [] for key in prompt_ids}
    for place, key in enumerate(table.column("prompt_id").to_pylist()):
        places[key].append(place)
    return table.take([place for some in places.values() for place in some])


def list_failures(stage: Stage, name: str, receipt: Receipt) -> None:
    """Write the failed rows of a shard to failed/, for people to read. The receipt remains the authority."""
    folder, file = stage.output.child("failed"), name.replace(".parquet", ".jsonl")
    lines = [{"prompt_id": key, "stage": stage.name, **why} for key, why in receipt.failed.items()]
    if lines:
        folder.write_bytes(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    elif folder.exists(file):
        folder.remove(file)


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What the driver keeps of a finished shard, whatever the number of its rows."""

    name: str
    rows_in: int
    rows_out: int
    failed: Mapping[str, int]
    """Number of failed rows by error class."""
    first_failure: str
    """Message of the first one; empty without any."""
    filtered: Mapping[str, int]
    """Number of rows left out on purpose, by reason."""
    unusable: Mapping[str, int]
    """Number of rows in the shard that are of no use, by reason."""
    first_unusable: str
    """Reason of the first one, with its details; empty without any."""
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    num_estimated: int
    sha256: str | None
    """Of the file; None where it was not known when the summary was made."""

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())


def summary_of(name: str, receipt: Receipt, sha256: str | None) -> ShardSummary:
    """Return the summary of a shard with this receipt."""
    return ShardSummary(
        name=name,
        rows_in=receipt.rows_in,
        rows_out=receipt.rows_out,
        failed=Counter(why["error"] for why in receipt.failed.values()),
        first_failure=next((why["message"] for why in receipt.failed.values()), ""),
        filtered=Counter(receipt.filtered.values()),
        unusable=Counter(reason.partition(": ")[0] for reason in receipt.unusable.values()),
        first_unusable=next(iter(receipt.unusable.values()), ""),
        prompt_tokens=receipt.prompt_tokens,
        completion_tokens=receipt.completion_tokens,
        cost_usd=receipt.cost_usd,
        num_estimated=receipt.num_estimated,
        sha256=sha256,
    )


def read_receipt(folder: Folder, name: str) -> Receipt:
    """Read the receipt of a shard from its footer."""
    return Receipt(**json.loads(folder.read_metadata(name)[RECEIPT]))


def write_first_shards(
    folder: Folder, rows: Iterator[dict[str, Any]], schema: pa.Schema, rows_per_shard: int | None, first: int = 0
) -> tuple[int, dict[str, str]]:
    """Write the shards that all later stages follow, from number `first` on.

    Returns the number of rows, and the sha256 of each file.
    """
    num_rows, files = 0, {}
    rows = iter(rows)
    for number, size in itertools.islice(enumerate(shard_sizes(rows_per_shard)), first, None):
        shard = list(itertools.islice(rows, size))
        if not shard:
            break
        files[shard_name(number)] = folder.write_table(shard_name(number), pa.Table.from_pylist(shard, schema=schema))
        num_rows += len(shard)
    return num_rows, files


def shard_sizes(rows_per_shard: int | None) -> Iterator[int]:
    """Yield the number of rows of each shard.

    With None, shards grow: 16 shards of 8 rows, 16 of 16, ..., then 512 rows each. A million rows make 2,033 files, and
    in a small run no shard is so large that the others wait for it.
    """
    if rows_per_shard is None:
        for size in (8, 16, 32, 64, 128, 256):
            yield from itertools.repeat(size, 16)
    yield from itertools.repeat(rows_per_shard or 512)


def shard_name(number: int) -> str:
    """Return a name such as `shard-00007.parquet`. Names sort like their numbers."""
    return f"shard-{number:05d}.parquet"
