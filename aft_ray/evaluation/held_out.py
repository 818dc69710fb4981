"""prompts -> evaluation/held_out: the prompts that the evaluation asks, so that later stages read nothing else.

in    prompts, or those of `evaluation.prompts` (`evaluation/prompts`), of which all are asked
out   prompts with split `held_out`
on    CPU
"""

from __future__ import annotations

from functools import partial
from typing import Any

from aft_ray.config import PlacementConfig
from aft_ray.records import HELD_OUT, PROMPTS
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.storage import Folder

NOT_HELD_OUT = "training prompt"
"""Why a stage of the evaluation leaves a row out."""


def held_out(run: Run) -> Folder:
    """Return the folder of the prompts that are asked."""
    return run.folder.child("evaluation").child("held_out")


class HeldOutWorker(RowWorker):
    """Passes held-out prompts on. `are_all`: none of these prompts is trained on."""

    def __init__(self, are_all: bool) -> None:
        self.are_all = are_all

    async def process(self, row: dict[str, Any]) -> Processed:
        if row["split"] != HELD_OUT and not self.are_all:
            return Processed(rows=[], filtered=NOT_HELD_OUT)
        return Processed(rows=[{**row, "split": HELD_OUT}])


def stage(run: Run) -> Stage:
    """Return the stage that collects the prompts to ask."""
    has_own = run.config.evaluation.prompts is not None
    return Stage(
        name="held-out",
        source=run.folder.child("evaluation/prompts" if has_own else "prompts"),
        output=held_out(run),
        schema=PROMPTS,
        settings={"prompts": "evaluation.prompts"} if has_own else {},
        worker=partial(HeldOutWorker, are_all=has_own),
        placement=PlacementConfig(num_cpus=0.1, max_shards_in_flight=4),
        is_light=True,
    )
