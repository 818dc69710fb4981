"""A worker whose rows take a second of waiting. A module of its own, because Ray's actors import it by name."""

from __future__ import annotations

import asyncio
from typing import Any

from aft_ray.shards import Processed, RowWorker


class WaitingWorker(RowWorker):
    """Passes every row on after a second."""

    async def process(self, row: dict[str, Any]) -> Processed:
        await asyncio.sleep(1)
        return Processed(rows=[row])
