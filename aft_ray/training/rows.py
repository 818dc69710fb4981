"""The rows that a worker trains on: an Arrow file on its node, written once and then mapped into memory.

    training_set/*.parquet --one shard at a time--> <cache>/rows/<name>.arrow --memory map--> every worker of the node

So the memory of a worker does not grow with the number of rows: pages of the file that are read belong to the page
cache of the node, which all workers share and the system may drop. Lengths are a column of numbers; nothing reads ids
to learn them. With a `pack_length`, the file holds the packed rows.

columns   input_ids, labels, num_tokens; packed rows also have seq_lengths, the lengths of their examples
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.errors import InputError
from aft_ray.records import TRAIN, TRAINING_SET, fingerprint
from aft_ray.runs import read_manifest
from aft_ray.storage import PARTIAL, Folder, cache_dir

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.dataset as pads

ROWS_PER_BATCH = 64
"""Rows that are in memory at a time while a file is written."""


def shard_hashes(training_set: Folder) -> dict[str, str]:
    """Return the sha256 of each shard of the training set by file name.

    The manifest of the training_set stage has them. A set that was made elsewhere is read to its end.
    """
    names = shard_names(training_set)
    manifest = read_manifest(training_set)
    if manifest is not None and manifest.status == "done" and sorted(manifest.files) == names:
        return dict(manifest.files)
    return {name: training_set.sha256(name) for name in names}


def shard_names(training_set: Folder) -> list[str]:
    """Return the names of the shards of a training set. Raises InputError where there is none."""
    names = training_set.names(".parquet")
    if not names:
        raise InputError(f"{training_set.location}: no *.parquet shards; expected the folder of the training_set stage")
    return names


def _shards(training_set: Folder) -> pads.Dataset:
    import pyarrow.dataset as pads

    files = [training_set.file(name) for name in shard_names(training_set)]
    rows = pads.dataset(files, format="parquet", filesystem=training_set.fs)
    missing = {"example_id", "variant", "split", "input_ids", "labels"} - set(rows.schema.names)
    if missing:
        raise InputError(f"{files[0]}: no column {', '.join(sorted(missing))}; expected {TRAINING_SET.names}")
    return rows


def _of(variant: str, split: str) -> Any:
    import pyarrow.dataset as pads

    return (pads.field("variant") == variant) & (pads.field("split") == split)


def all_variants(training_set: Folder) -> list[str]:
    """Return the names of the variants in a training set, sorted."""
    found: set[str] = set()
    for batch in _shards(training_set).to_batches(columns=["variant"]):
        found.update(batch["variant"].unique().to_pylist())
    return sorted(found)


def first_examples(training_set: Folder, variant: str, num_rows: int, split: str = TRAIN) -> list[dict[str, Any]]:
    """Return example_id, input_ids and labels of the first rows of one variant and split, in shard order."""
    columns = ["example_id", "input_ids", "labels"]
    return _shards(training_set).head(num_rows, columns=columns, filter=_of(variant, split)).to_pylist()


def lengths_of(training_set: Folder, variant: str) -> np.ndarray:
    """Return the length in tokens of every row that a variant trains on, in shard order.

    Raises InputError where there is no row to train on.
    """
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.dataset as pads

    rows = _shards(training_set)
    has_column = "num_tokens" in rows.schema.names  # a set that was made elsewhere may lack it
    length = pads.field("num_tokens") if has_column else pc.list_value_length(pads.field("input_ids"))
    batches = rows.to_batches(columns={"num_tokens": length}, filter=_of(variant, TRAIN))
    found = [np.asarray(batch["num_tokens"]) for batch in batches if batch.num_rows]
    if found:
        return np.concatenate(found)
    filtered = getattr(read_manifest(training_set), "filtered", {})
    raise InputError(
        f"{training_set.location}: no row of variant {variant!r} to train on; variants found: "
        f"{all_variants(training_set)}; rows that its stage left out, by reason: {dict(filtered)}"
    )


def rows_on_this_node(training_set: Folder, hashes: dict[str, str], variant: str, pack_length: int | None) -> Any:
    """Return the rows to train on as the `datasets.Dataset` that TRL takes, from a file that this node keeps.

    The first worker of a node writes the file and the others wait for it. `hashes`: sha256 of the shards by name.
    """
    from filelock import FileLock

    file = node_file(hashes, variant, pack_length)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if not file.exists():
            write_rows(training_set, variant, pack_length, file)
    return open_rows(file)


def node_file(hashes: dict[str, str], variant: str, pack_length: int | None) -> Path:
    """Return where a node keeps the rows of a variant. The name says what is in the file."""
    name = fingerprint({"training_set": hashes, "variant": variant, "pack_length": pack_length})
    return cache_dir() / "rows" / f"{name[:24]}.arrow"


def open_rows(file: Path) -> Any:
    """Return the rows of a file as a `datasets.Dataset` that maps it into memory."""
    from datasets import Dataset

    return Dataset.from_file(str(file))


def write_rows(training_set: Folder, variant: str, pack_length: int | None, file: Path) -> None:
    """Write the rows of a variant to `file`, whole or not at all, packed where `pack_length` is set."""
    partial = file.with_name(file.name + PARTIAL)
    _write_examples(training_set, variant, partial)
    if pack_length is not None:
        examples = partial
        partial = file.with_name(f"{file.name}.packed{PARTIAL}")
        _write_packed(examples, pack_length, partial)
        examples.unlink()
    partial.rename(file)


def _write_examples(training_set: Folder, variant: str, file: Path) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    batches = _shards(training_set).to_batches(
        columns=["input_ids", "labels"],
        filter=_of(variant, TRAIN),
        batch_size=ROWS_PER_BATCH,
        batch_readahead=1,
        fragment_readahead=1,
        use_threads=False,
    )
    schema = pa.schema([*(TRAINING_SET.field(name) for name in ("input_ids", "labels", "num_tokens"))])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        for batch in batches:
            lengths = pc.list_value_length(batch["input_ids"])
            out.write_batch(pa.record_batch([batch["input_ids"], batch["labels"], lengths], schema=schema))


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the examples of each packed row, by best fit decreasing: the longest first, each into the fullest row.

    A function of the lengths alone, so that nothing else need be read. TRL's `pack_dataset` makes the same rows, but
    copies all of them in memory. Raises InputError for an example longer than `capacity`, which packing would cut.

    >>> best_fit([2, 4, 3], capacity=6)
    [[1, 0], [2]]
    """
    longest = max(lengths)
    if longest > capacity:
        raise InputError(
            f"training.pack_length {capacity}: the longest example has {longest} tokens. Raise pack_length"
        )
    rows: list[list[int]] = []
    open_rows: dict[int, deque[int]] = {}  # rows by the number of places that are left in them, ...
    spaces: list[int] = []  # ... and these numbers, sorted
    for example in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = int(lengths[example])
        place = bisect.bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = open_rows[space].popleft()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
        rows[row].append(example)
        left = space - length
        if left and left not in open_rows:
            bisect.insort(spaces, left)
        open_rows.setdefault(left, deque()).append(row)
    return rows


def _write_packed(examples: Path, capacity: int, file: Path) -> None:
    """Write the packed rows of the examples in one file to another, a few rows in memory at a time."""
    import pyarrow as pa

    rows = open_rows(examples)
    packs = best_fit(lengths_in(rows).tolist(), capacity)
    arrow = rows.with_format("arrow")
    schema = pa.schema([*arrow.data.schema, pa.field("seq_lengths", pa.list_(pa.int32()))]).remove_metadata()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
        for start in range(0, len(packs), ROWS_PER_BATCH):
            packed = [_packed(arrow[pack]) for pack in packs[start : start + ROWS_PER_BATCH]]
            columns = [[row[name] for row in packed] for name in schema.names]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            out.write_batch(pa.record_batch(arrays, schema=schema))


def _packed(examples: pa.Table) -> dict[str, Any]:
    """Return several examples as one row."""
    seq_lengths = examples["num_tokens"].to_numpy()
    return {
        "input_ids": examples["input_ids"].combine_chunks().flatten().to_numpy(),
        "labels": examples["labels"].combine_chunks().flatten().to_numpy(),
        "num_tokens": seq_lengths.sum(),
        "seq_lengths": seq_lengths,
    }


def lengths_in(rows: Any) -> np.ndarray:
    """Return the length in tokens of every row of an opened file."""
    import numpy as np

    return np.asarray(rows.data.column("num_tokens"))


def shortest(rows: Any, num_rows: int) -> list[dict[str, Any]]:
    """Return the shortest rows of an opened file."""
    import numpy as np

    return [rows[int(place)] for place in np.argsort(lengths_in(rows), kind="stable")[:num_rows]]
