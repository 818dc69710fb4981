"""What the tiny model speaks, and how its training set lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.records import TRAINING_SET

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
WORDS = ["river", "bridge", "bird", "hill", "town", "lamp", "seven", "under", "old", "green", "near", "small", "bright"]
WORDS += ["watch", "run", "the", "a", "of"]
ANSWER = "the old bridge watch over seven bright lamp"
NUM_ROWS = 24
"""Rows to train on, by variant: three global batches of eight."""


def write_training_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    middle = len(rows) // 2
    for number, part in enumerate((rows[:middle], rows[middle:])):
        pq.write_table(pa.Table.from_pylist(part, schema=TRAINING_SET), folder / f"shard-{number:05d}.parquet")
    return folder
