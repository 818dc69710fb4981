"""scores -> selection: which K proposals a prompt keeps, and in which order they are shown.

in    + proposals with score
out   + selected: indices into proposals, in prompt order; selection_reason
on    CPU
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from aft_ray.config import SelectionConfig
from aft_ray.errors import InputError
from aft_ray.records import SELECTION, derive_seed
from aft_ray.runs import Run
from aft_ray.stages import Processed, RowWorker, Stage


def select(
    proposals: Sequence[Mapping[str, Any]], config: SelectionConfig, draw: random.Random
) -> tuple[list[int], str]:
    """The kept indices in the order shown, and why these.

    `top_k` takes the best scores, ties and unscored proposals by lot (unscored ones only when too few are scored).
    Failed and empty proposals are never kept. Fewer than K usable ones are all kept, and the reason says so.

    >>> select([{"text": "a", "error": None, "score": 0.0}, {"text": "b", "error": None, "score": 1.0}],
    ...        SelectionConfig(num_proposals=1), random.Random(0))
    ([1], 'top_k')
    """
    usable = [i for i, proposal in enumerate(proposals) if proposal["text"] and not proposal["error"]]
    if not usable:
        raise InputError("no usable proposal: all failed or are empty")
    draw.shuffle(usable)  # the sort below is stable: equal scores stay in this drawn order
    reason: str = config.strategy
    if config.strategy == "top_k":
        usable.sort(key=lambda i: (proposals[i]["score"] is None, -(proposals[i]["score"] or 0.0)))
        if all(proposals[i]["score"] is None for i in usable):
            reason = "random: no scores"
    kept = usable[: config.num_proposals]
    if len(kept) < config.num_proposals:
        reason += f", {len(kept)} of {config.num_proposals} usable"
    if config.shuffle:
        draw.shuffle(kept)
    else:
        kept.sort()
    return kept, reason


class SelectionWorker(RowWorker):
    """Selects the proposals of a row, with a draw of its own."""

    def __init__(self, config: SelectionConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    async def process(self, row: dict[str, Any]) -> Processed:
        draw = random.Random(derive_seed(self.seed, row["prompt_id"], 0, -1))
        selected, reason = select(row["proposals"], self.config, draw)
        return Processed(rows=[{**row, "selected": selected, "selection_reason": reason}])


def selected_texts(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row's selection, in prompt order."""
    return [row["proposals"][index]["text"] for index in row["selected"]]


def stage(run: Run) -> Stage:
    """The selection stage of a run."""
    config = run.config.selection
    return Stage(
        name="selection",
        source=run.folder.child("scores"),
        output=run.folder.child("selection"),
        schema=SELECTION,
        settings={"selection": config.model_dump(mode="json", exclude={"placement"}), "seed": run.config.run.seed},
        worker=partial(SelectionWorker, config, run.config.run.seed),
        placement=config.placement,
    )
