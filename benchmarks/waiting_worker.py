"""A worker whose rows take a time of waiting. It has its own module because Ray's actors import it by name."""

from __future__ import annotations

import asyncio
from typing import Any

from aft_ray.shards import Processed, RowWorker


class WaitingWorker(RowWorker):
    """Returns every row unchanged after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def process(self, row: dict[str, Any]) -> Processed:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        return Processed(rows=[row])
