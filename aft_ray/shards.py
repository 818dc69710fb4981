"""The unit of work and of resume: one shard of a stage's source becomes one shard of its output.

The first stage fixes the shards; every later one turns `shard-00007.parquet` of its source into `shard-00007.parquet`
of its own. It appears whole or not at all, with a receipt in its footer that accounts for every row of its source:
written, filtered or failed. So no row can be written twice or lost, and a shard whose source has grown (failed rows of
the stage before were retried) is completed by what it lacks.
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


NOTHING = Receipt(rows_in=0, rows_out=0, failed={}, filtered={}, prompt_tokens=0, completion_tokens=0, cost_usd=0.0)


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
    list_failures(stage, name, receipt)
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


def list_failures(stage: Stage, name: str, receipt: Receipt) -> None:
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
