"""Opens the sources of prompts. Every source yields raw rows with their places, and can be read again.

    packaged:constraints              instructions with machine-checkable constraints; they come with the package
    FILE.jsonl, FILE.parquet          one row per prompt; a local path, s3://... or gs://...
    hub:DATASET[@CONFIG][:SPLIT]      a data set of the Hugging Face hub; the default split is `train`
    reasoning_gym:TASK[,TASK...]      procedural tasks with their own verifiers, interleaved
    arithmetic:PARTITION              chains of operations modulo twenty (`aft_ray.data.arithmetic`): tuning, final

Blank lines are skipped. A line that cannot be parsed is yielded as an InputError, and the caller decides its outcome.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from aft_ray.data.arithmetic import PARTITIONS, questions, worked
from aft_ray.errors import ConfigError, InputError

SOURCES = (
    "packaged:constraints, FILE.jsonl, FILE.parquet, hub:DATASET[@CONFIG][:SPLIT], reasoning_gym:TASK[,TASK...] or "
    "arithmetic:PARTITION"
)
NUM_PROCEDURAL = 500
"""Number of rows drawn from `reasoning_gym` or `arithmetic` if the config sets no limit."""

Placed = tuple[str, Any]
"""The place of a raw row (`prompts.jsonl:3`), and the row itself, or the InputError that says why it cannot be read."""


def read_source(source: str, limit: int | None, seed: int, key: str = "prompts.source") -> Iterator[Placed]:
    """Yield the first `limit` rows of a source, in its order. `seed` draws the items of procedural sources.

    Raises InputError, which names the setting `key`, if the source is missing, and ConfigError if a package is missing.
    """
    return itertools.islice(_open(source, limit, seed, f"{key} {source}"), limit)


def _open(source: str, limit: int | None, seed: int, name: str) -> Iterator[Placed]:
    kind, _, rest = source.partition(":")
    if kind == "packaged":
        return _packaged(rest, name)
    if kind == "hub":
        return _hub(rest, name)
    if kind == "reasoning_gym":
        return _reasoning_gym(rest, limit or NUM_PROCEDURAL, seed, name)
    if kind == "arithmetic":
        return _arithmetic(rest, limit or NUM_PROCEDURAL, seed, name)
    if source.endswith(".jsonl"):
        return _jsonl(source, name)
    if source.endswith(".parquet"):
        return _parquet(source, name)
    raise InputError(f"{name}: unknown kind of source or file suffix; expected {SOURCES}")


def _packaged(packaged: str, name: str) -> Iterator[Placed]:
    if packaged != "constraints":
        raise InputError(f"{name}: the package has no such prompts; expected constraints")
    with resources.as_file(resources.files("aft_ray.data") / "constraints.jsonl") as path:
        yield from _jsonl(str(path), name)


def _open_file(source: str, name: str) -> Any:
    import pyarrow as pa
    from pyarrow import fs

    try:
        if "://" in source:
            system, path = fs.FileSystem.from_uri(source)
        else:
            system, path = fs.LocalFileSystem(), str(Path(source).expanduser().absolute())
        return system.open_input_file(path)
    except FileNotFoundError:
        raise InputError(f"{name}: no such file. Expected {SOURCES}") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name}: cannot be opened: {error}") from None


def _jsonl(source: str, name: str) -> Iterator[Placed]:
    with _open_file(source, name) as file:
        for number, line in enumerate(io.BufferedReader(file), start=1):
            if line.strip():
                yield f"{source}:{number}", _json_line(line, f"{source}:{number}")


def _json_line(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return InputError(f"{place}: not UTF-8 text (byte {error.start}: {error.reason}). Save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return InputError(
            f"{place}: not valid JSON ({error}); expected one JSON object per line, found {_excerpt(line)}"
        )


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _parquet(source: str, name: str) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open_file(source, name) as file:
        try:
            batches = pq.ParquetFile(file).iter_batches(batch_size=256)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{source}:row {number}", row
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{name}: not a valid Parquet file: {error}") from None


def _hub(reference: str, name: str) -> Iterator[Placed]:
    import datasets

    dataset, _, split = reference.partition(":")
    path, _, config_name = dataset.partition("@")
    try:
        rows = datasets.load_dataset(path, config_name or None, split=split or "train")
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        cause = (str(error) or repr(error)).splitlines()[0]
        raise InputError(
            f"{name}: cannot be loaded: {cause}. "
            "Check the name (hub:DATASET[@CONFIG][:SPLIT]) and the connection, or give a local .jsonl or .parquet file"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"hub:{reference}:row {number}", row


def _reasoning_gym(names: str, num_rows: int, seed: int, name: str) -> Iterator[Placed]:
    """Yield items of the named tasks in turn. The scorer makes an item again from its seed, size and index."""
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(f"{name}: reasoning_gym is not installed; pip install aft-ray[tasks]") from None

    tasks = [task.strip() for task in names.split(",") if task.strip()]
    if not tasks:
        raise InputError(f"{name}: names no task; expected reasoning_gym:TASK[,TASK...]")
    size = -(-num_rows // len(tasks))
    try:
        items = {task: reasoning_gym.create_dataset(task, size=size, seed=seed) for task in tasks}
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    for index, task in itertools.product(range(size), tasks):
        entry = items[task][index]
        recipe = {"name": task, "seed": seed, "size": size, "index": index}
        row = {"prompt_id": f"{task}-{seed}-{index}", "question": entry["question"], "reference": entry["answer"]}
        yield f"reasoning_gym:{task}:{index}", {**row, "task": "reasoning_gym", "reasoning_gym": recipe}


def _arithmetic(partition: str, num_rows: int, seed: int, name: str) -> Iterator[Placed]:
    if partition not in PARTITIONS:
        raise InputError(f"{name}: no such partition; expected arithmetic: and one of {', '.join(PARTITIONS)}")
    for number, question in enumerate(itertools.islice(questions(partition, seed), num_rows), start=1):
        row = {"question": question, "reference": worked(question), "task": "numeric"}
        yield f"arithmetic:{partition}:{number}", row
