"""A shard is the unit of work and of resume: one shard of a stage's source becomes one shard of its output.

The first stage fixes the shards; every later stage turns `shard-00007.parquet` of its source into
`shard-00007.parquet` of its output. An output shard appears whole or not at all, and the receipt in its footer accounts
for every row of its source: written, filtered or failed. So no row can be lost or written twice. When a source shard
has grown, because failed rows of the stage before were retried, only the missing rows are added to its output.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from aft_ray.config import PlacementConfig
from aft_ray.errors import ConfigError
from aft_ray.runs import Manifest, write_manifest
from aft_ray.storage import Folder
from aft_ray.templates.control import without_surrogates

logger = logging.getLogger(__name__)

RECEIPT = b"aft_ray.receipt"
"""Key of the receipt in the Parquet footer of a shard. Totals are sums of receipts, so they survive any resume."""


@dataclass(frozen=True, kw_only=True)
class Processed:
    """The rows made from one row, usually one, and the tokens that were spent on them."""

    rows: list[dict[str, Any]]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    """Price of these tokens at a remote endpoint."""
    filtered: str | None = None
    """Why the row was left out on purpose. It is counted, but is not a failure."""


class RowWorker(Protocol):
    """The work of a stage on one row. Each actor builds one worker, inside its event loop."""

    async def process(self, row: dict[str, Any]) -> Processed:
        """Return the rows made from `row`. An exception fails this row alone; its class and message go to failed/."""
        ...

    async def check(self) -> None:
        """Raise when the worker itself is broken (its engine died, say): then the rows do not count as failed."""
        return None


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


EMPTY_RECEIPT = Receipt(
    rows_in=0, rows_out=0, failed={}, filtered={}, prompt_tokens=0, completion_tokens=0, cost_usd=0.0
)


async def make_shard(
    stage: Stage,
    name: str,
    worker: RowWorker,
    count: Callable[[int, int], None] = lambda failed, tokens: None,
    retry_failed: bool = False,
) -> Receipt:
    """Make the rows that an output shard lacks, all at once; keep their order, and record failures in the receipt."""
    source = stage.source.read_table(name).to_pylist()
    before = read_receipt(stage.output, name) if stage.output.exists(name) else EMPTY_RECEIPT
    kept = stage.output.read_table(name).to_pylist() if before.rows_in else []
    failed = {} if retry_failed else dict(before.failed)
    accounted = {row["prompt_id"] for row in kept} | failed.keys() | before.filtered.keys()

    async def one(row: dict[str, Any]) -> Processed | dict[str, str]:
        try:
            done = await worker.process(row)
        except ConfigError:  # a missing package or a wrong setting would fail every row
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
    list_failures(stage, name, receipt)
    return receipt


def _failure(error: Exception) -> dict[str, str]:
    """Return the class and message of an error, without lone surrogates: Ray ends a worker that logs one."""
    return {"error": type(error).__name__, "message": without_surrogates(str(error))[:2000]}


def _writable(results: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """Return the results, with rows that cannot be stored as failures: a lone surrogate, a number out of range."""

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


def list_failures(stage: Stage, name: str, receipt: Receipt) -> None:
    """Write the failed rows of a shard to failed/, for people to read. The receipt remains the authority."""
    folder, file = stage.output.child("failed"), name.replace(".parquet", ".jsonl")
    lines = [{"prompt_id": key, "stage": stage.name, **why} for key, why in receipt.failed.items()]
    if lines:
        folder.write_bytes(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    elif folder.exists(file):
        folder.remove(file)


def read_receipt(folder: Folder, name: str) -> Receipt:
    """Read the receipt of a shard from its footer."""
    return Receipt(**json.loads(folder.read_metadata(name)[RECEIPT]))


def write_first_shards(
    folder: Folder, rows: Iterator[dict[str, Any]], schema: pa.Schema, rows_per_shard: int | None
) -> int:
    """Write the shards that all later stages follow, and return the number of rows."""
    num_rows, rows = 0, iter(rows)
    for number, size in enumerate(shard_sizes(rows_per_shard)):
        shard = list(itertools.islice(rows, size))
        if not shard:
            break
        folder.write_table(shard_name(number), pa.Table.from_pylist(shard, schema=schema))
        num_rows += len(shard)
    return num_rows


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


def finish_without_source(folder: Folder, manifest: Manifest, rows_in: int, rows_out: int) -> Manifest:
    """Write and return the finished manifest of the stage that has no source stage (prompts)."""
    files = {name: folder.sha256(name) for name in folder.names(".parquet")}
    done = dataclasses.replace(manifest, status="done", rows_in=rows_in, rows_out=rows_out, files=files)
    write_manifest(folder, done)
    return done
