"""A worker whose rows take a second of waiting. It has its own module because Ray's actors import it by name."""

from __future__ import annotations

import asyncio
from typing import Any

from aft_ray.shards import Processed, RowWorker


class WaitingWorker(RowWorker):
    """Returns every row unchanged after a second."""

    async def process(self, row: dict[str, Any]) -> Processed:
        await asyncio.sleep(1)
        return Processed(rows=[row])
