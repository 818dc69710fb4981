"""source -> prompts: the first stage. It reads and checks every prompt, and fixes the shards all later stages keep.

out   prompt_id, messages, reference, task, metadata, split
on    the driver

Held-out prompts (split `held_out`) are chosen by a seeded hash of their id, so the choice does not depend on order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from pathlib import Path

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts import read_prompts, split_held_out
from aft_ray.records import HELD_OUT, PROMPTS, TRAIN
from aft_ray.runs import Manifest, Run, begin, write_manifest
from aft_ray.stages import finish_without_source, write_first_shards


def make_prompts(run: Run) -> Manifest:
    """Write `prompts/` of a run, or return its manifest when it is there already."""
    config = run.config.prompts
    folder = run.folder.child("prompts")
    settings = {
        "prompts": config.model_dump(mode="json"),
        "seed": run.config.run.seed,
        "source_sha256": source_sha256(config),
    }
    manifest = begin(folder, "prompts", settings)
    if manifest.status == "done":
        return manifest
    write_manifest(folder, manifest)
    started = time.monotonic()
    rows = list(read_prompts(config, run.config.run.seed))
    _, held_out = split_held_out(rows, config.held_out, run.config.run.seed)
    held_out_ids = {row["prompt_id"] for row in held_out}
    marked = ({**row, "split": HELD_OUT if row["prompt_id"] in held_out_ids else TRAIN} for row in rows)
    num_rows = write_first_shards(folder, marked, PROMPTS, config.rows_per_shard)
    manifest = dataclasses.replace(manifest, seconds=round(time.monotonic() - started, 1))
    return finish_without_source(folder, manifest, rows_in=len(rows), rows_out=num_rows)


def source_sha256(config: PromptsConfig) -> str | None:
    """The content of a file source, so that an edited file is another run; None for any other source."""
    path = Path(config.source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
