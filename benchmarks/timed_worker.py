"""The proposals stage's own worker with a stopwatch. A module of its own, because Ray's actors import it by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from aft_ray.data.proposals import ProposalWorker
from aft_ray.stages import Processed


class TimedWorker(ProposalWorker):
    """Notes when each row began and ended (CLOCK_MONOTONIC is one for all processes of a machine)."""

    def __init__(self, log: Path, *args: Any) -> None:
        super().__init__(*args)
        self.log = log

    async def process(self, row: dict[str, Any]) -> Processed:
        began = time.monotonic()
        done = await super().process(row)
        with self.log.open("a") as log:
            log.write(json.dumps([began, time.monotonic(), done.completion_tokens]) + "\n")
        return done
