"""Opens the sources of prompts. Every source yields raw rows with their places, and can be read again.

    packaged:constraints                     instructions with machine-checkable constraints; part of the package
    FILE, FOLDER/ or GLOB                    JSON lines, JSON, CSV or Parquet: see files.py; a path, s3://... or gs://...
    hub:DATASET[@CONFIG][:SPLIT][#REVISION]  a data set of the Hugging Face hub; the default split is `train`
    reasoning_gym:TASK[,TASK...]             procedural tasks with their own verifiers, interleaved
    arithmetic:PARTITION                     chains of operations modulo twenty (`aft_ray.data.arithmetic`)

A row that cannot be read is yielded as an InputError, and the caller decides its outcome. With a limit, no more is read
or downloaded than its rows need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

from aft_ray.data.arithmetic import PARTITIONS, questions, worked
from aft_ray.data.prompts.files import Placed, content_of, read_files
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import fingerprint

NUM_PROCEDURAL = 500
"""Number of rows drawn from `reasoning_gym` or `arithmetic` if the config sets no limit."""


def kind_of_source(source: str) -> str:
    """Return `packaged`, `hub`, `reasoning_gym` or `arithmetic`, else `files`."""
    kind = source.partition(":")[0]
    return kind if kind in {"packaged", "hub", "reasoning_gym", "arithmetic"} else "files"


def read_source(source: str, limit: int | None, seed: int, key: str = "prompts.source") -> Iterator[Placed]:
    """Yield the first `limit` rows of a source, in its order. `seed` draws the items of procedural sources.

    Raises InputError, which names the setting `key`, if the source is missing, and ConfigError if a package is missing.
    """
    return itertools.islice(_open(source, limit, seed, f"{key} {source}"), limit)


def source_content(source: str, limit: int | None) -> str | None:
    """Return a hash of what the first `limit` rows of a source come from, however it is spelt; None if it is not there.

    A data set of the hub counts by its name and revision.
    """
    content = content_of(source) if kind_of_source(source) == "files" else source
    return None if content is None else fingerprint([content, limit])


def _open(source: str, limit: int | None, seed: int, name: str) -> Iterator[Placed]:
    rest = source.partition(":")[2]
    match kind_of_source(source):
        case "packaged":
            return _packaged(rest, name)
        case "hub":
            return _hub(rest, limit, name)
        case "reasoning_gym":
            return _reasoning_gym(rest, limit or NUM_PROCEDURAL, seed, name)
        case "arithmetic":
            return _arithmetic(rest, limit or NUM_PROCEDURAL, seed, name)
    return read_files(source, name)


def _packaged(packaged: str, name: str) -> Iterator[Placed]:
    if packaged != "constraints":
        raise InputError(f"{name}: the package has no such prompts; expected constraints")
    with resources.as_file(resources.files("aft_ray.data") / "constraints.jsonl") as path:
        yield from read_files(str(path), name)


class HubDataset(NamedTuple):
    """What `DATASET[@CONFIG][:SPLIT][#REVISION]` names; a part that is left out is empty, the split is `train`."""

    path: str
    config: str
    split: str
    revision: str

    @classmethod
    def of(cls, reference: str) -> HubDataset:
        """Read a reference, without the `hub:` before it."""
        named, _, revision = reference.partition("#")
        dataset, _, split = named.partition(":")
        path, _, config = dataset.partition("@")
        return cls(path, config, split or "train", revision)


def _hub(reference: str, limit: int | None, name: str) -> Iterator[Placed]:
    """Yield the rows of a data set of the hub; with a limit they are streamed instead of downloaded whole."""
    import datasets

    asked = HubDataset.of(reference)
    is_streamed = limit is not None and "[" not in asked.split  # a slice such as train[:10%] cannot be streamed
    try:
        rows: Any = datasets.load_dataset(
            asked.path, asked.config or None, split=asked.split, revision=asked.revision or None, streaming=is_streamed
        )
        for number, row in enumerate(rows, start=1):
            yield f"hub:{reference}:row {number}", row
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        cause = (str(error) or repr(error)).splitlines()[0]
        raise InputError(
            f"{name}: cannot be loaded: {cause}. Check the name (hub:DATASET[@CONFIG][:SPLIT][#REVISION]) and the "
            "connection, or give a local file"
        ) from None


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
