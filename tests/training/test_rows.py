"""The rows to train on: read from the training set, packed, and mapped into memory instead of held in it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import NUM_ROWS

from aft_ray.errors import InputError
from aft_ray.records import HELD_OUT, TRAIN, TRAINING_SET
from aft_ray.runs import Manifest, write_manifest
from aft_ray.storage import Folder
from aft_ray.training.rows import (
    all_variants,
    best_fit,
    first_examples,
    lengths_in,
    lengths_of,
    open_rows,
    shard_hashes,
    shortest,
    write_rows,
)

PACK_LENGTH = 128


def examples_to_train(examples: list[dict[str, Any]], variant: str = "aft") -> list[dict[str, Any]]:
    return [row for row in examples if row["variant"] == variant and row["split"] == TRAIN]


def test_the_file_holds_the_rows_of_the_variant_as_they_were_written(
    training_set: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_rows(Folder.at(training_set), "aft", None, tmp_path / "rows.arrow")
    rows = open_rows(tmp_path / "rows.arrow")
    expected = [{name: row[name] for name in rows.column_names} for row in examples_to_train(examples)]
    assert list(rows) == expected
    assert lengths_in(rows).tolist() == [len(row["input_ids"]) for row in expected]
    assert [len(row["input_ids"]) for row in shortest(rows, 2)] == sorted(lengths_in(rows))[:2]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.arrow"]


def test_packed_rows_hold_every_example_once_and_whole(
    training_set: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_rows(Folder.at(training_set), "aft", PACK_LENGTH, tmp_path / "rows.arrow")
    found = []
    for row in open_rows(tmp_path / "rows.arrow"):
        assert sum(row["seq_lengths"]) == row["num_tokens"] == len(row["input_ids"]) <= PACK_LENGTH
        ends = np.cumsum(row["seq_lengths"]).tolist()
        found += [
            (row["input_ids"][end - length : end], row["labels"][end - length : end])
            for length, end in zip(row["seq_lengths"], ends, strict=True)
        ]
    expected = [(row["input_ids"], row["labels"]) for row in examples_to_train(examples)]
    assert sorted(found) == sorted(expected)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.arrow"]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_filled_as_trl_fills_them(seed: int) -> None:
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    draw = random.Random(seed)
    lengths = [draw.randint(1, 64) for _ in range(500)]
    packed: Any = pack_dataset(Dataset.from_dict({"input_ids": [[0] * length for length in lengths]}), 64, "bfd")
    expected = sorted(sorted(row) for row in packed["seq_lengths"])
    assert sorted(sorted(lengths[place] for place in row) for row in best_fit(lengths, 64)) == expected


def test_an_example_longer_than_a_packed_row_is_refused() -> None:
    with pytest.raises(InputError, match=r"pack_length 64: the longest example has 65 tokens"):
        best_fit([3, 65], 64)


def test_lengths_come_from_their_column_and_from_the_ids_where_it_is_missing(
    training_set: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    expected = [len(row["input_ids"]) for row in examples_to_train(examples)]
    assert lengths_of(Folder.at(training_set), "aft").tolist() == expected
    for file in training_set.glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["num_tokens"]), tmp_path / file.name)
    assert lengths_of(Folder.at(tmp_path), "aft").tolist() == expected


def test_variants_splits_and_the_first_examples_are_found(training_set: Path) -> None:
    folder = Folder.at(training_set)
    assert all_variants(folder) == ["aft", "sft"]
    assert len(first_examples(folder, "aft", 5)) == 5
    held_out = first_examples(folder, "sft", 100, HELD_OUT)
    assert [row["example_id"] for row in held_out] == [f"p-{NUM_ROWS + number}-sft" for number in range(2)]


def test_hashes_come_from_the_manifest_of_a_finished_stage(
    training_set: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    from tiny import write_training_set

    folder = Folder.at(write_training_set(tmp_path, examples))
    read = shard_hashes(folder)
    assert read == {name: folder.sha256(name) for name in folder.names(".parquet")}
    told = dict.fromkeys(read, "from the manifest")
    for status, expected in (("running", read), ("done", told)):
        write_manifest(folder, Manifest(stage="training_set", status=status, fingerprint="", settings={}, files=told))  # type: ignore[arg-type]
        assert shard_hashes(folder) == expected


LOAD = """
import json, sys
from pathlib import Path
from aft_ray.storage import Folder
from aft_ray.training.examples import batch_order
from aft_ray.training.rows import lengths_in, rows_on_this_node
import datasets, pyarrow.dataset  # their own memory does not count

def held():
    [line] = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if "Anonymous" in line]
    return 1024 * int(line.split()[1])

set_of_rows, pack_length = Folder.at(sys.argv[1]), json.loads(sys.argv[2])
before = held()
rows = rows_on_this_node(set_of_rows, {"x": sys.argv[1]}, "aft", pack_length)
order = batch_order(lengths_in(rows).tolist(), 8, 1, 0)
batch = [rows[place] for place in order[:8]]
print(json.dumps({"rows": len(rows), "bytes": held() - before}))
"""


def write_long_rows(folder: Path, num_rows: int, num_tokens: int) -> None:
    """Write a training set of equal rows in shards of 256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    row = dict.fromkeys(TRAINING_SET.names) | {"example_id": "p", "variant": "aft", "split": TRAIN}
    row |= {"input_ids": list(range(num_tokens)), "labels": list(range(num_tokens)), "num_tokens": num_tokens}
    shard = pa.Table.from_pylist([row] * 256, schema=TRAINING_SET)
    for number in range(num_rows // 256):
        pq.write_table(shard, folder / f"shard-{number:05d}.parquet")


@pytest.mark.soak
@pytest.mark.parametrize("pack_length", [None, 8192])
def test_memory_does_not_grow_with_the_rows(pack_length: int | None, tmp_path: Path) -> None:
    """A worker that opens the file which another one wrote, as all workers of a node but the first do."""
    used = {}
    for num_rows in (512, 8192):
        folder = tmp_path / str(num_rows)
        write_long_rows(folder, num_rows, 1024)
        command = [sys.executable, "-c", LOAD, str(folder), json.dumps(pack_length)]
        environment = {**os.environ, "AFT_RAY_CACHE": str(tmp_path / "cache")}
        for _ in range(2):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        used[num_rows] = json.loads(done.stdout)
    assert used[8192]["rows"] == 16 * used[512]["rows"]
    growth = used[8192]["bytes"] - used[512]["bytes"]
    assert growth < 4 * 2**20, used  # the rows themselves are 64 MB, and 4 MB
