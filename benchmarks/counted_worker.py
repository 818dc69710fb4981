"""A worker for the proposals stage that leaves a file each time it is built, and whose rows begin at random moments.

It has its own module because Ray's actors import it by name.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

from aft_ray.config import Config
from aft_ray.data.proposals import Part, ProposalWorker
from aft_ray.shards import Processed


class CountedWorker(ProposalWorker):
    """Writes proposals, and a file in `folder` per engine.

    A row waits a random time of up to `delay_s` first, the same in every run, so that rows are at different places when
    an engine dies, as answers of different lengths are.
    """

    def __init__(self, folder: Path, delay_s: float, config: Config, part: Part) -> None:
        super().__init__(config, part)
        self.delay_s = delay_s
        (folder / str(time.monotonic_ns())).touch()

    async def process(self, row: dict[str, Any]) -> Processed:
        await asyncio.sleep(random.Random(row["prompt_id"]).random() * self.delay_s)
        return await super().process(row)
