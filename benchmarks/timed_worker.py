"""A waiting worker that writes down when each of its rows was under way. Ray's actors import it by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from waiting_worker import WaitingWorker

from aft_ray.shards import Processed


class TimedWorker(WaitingWorker):
    """Appends `[began, ended]`, in Unix seconds, to a file of its own for every row."""

    def __init__(self, seconds: float, folder: Path) -> None:
        super().__init__(seconds)
        self.file = folder / f"{time.time_ns()}.jsonl"

    async def process(self, row: dict[str, Any]) -> Processed:
        began = time.time()
        done = await super().process(row)
        with self.file.open("a") as file:
            file.write(json.dumps([began, time.time()]) + "\n")
        return done
