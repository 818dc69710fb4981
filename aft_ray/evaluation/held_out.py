"""prompts -> evaluation/held_out: the prompts that the evaluation asks, so that later stages read nothing else.

in    prompts
out   prompts with split `held_out`
on    CPU
"""

from __future__ import annotations

from typing import Any

from aft_ray.config import PlacementConfig
from aft_ray.records import HELD_OUT, PROMPTS
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.storage import Folder

NOT_HELD_OUT = "training prompt"
"""Why a stage of the evaluation leaves a row out."""


def held_out(run: Run) -> Folder:
    """Return the folder of the held-out prompts."""
    return run.folder.child("evaluation").child("held_out")


class HeldOutWorker(RowWorker):
    """Passes held-out prompts on."""

    async def process(self, row: dict[str, Any]) -> Processed:
        if row["split"] != HELD_OUT:
            return Processed(rows=[], filtered=NOT_HELD_OUT)
        return Processed(rows=[row])


def stage(run: Run) -> Stage:
    """Return the stage that collects the held-out prompts."""
    return Stage(
        name="held-out",
        source=run.folder.child("prompts"),
        output=held_out(run),
        schema=PROMPTS,
        settings={},
        worker=HeldOutWorker,
        placement=PlacementConfig(num_cpus=0.1, max_shards_in_flight=4),
        is_light=True,
    )
