"""metrics.jsonl: one line per optimizer step, written by the first worker and read by the driver while training runs.

    {"step": 12, "loss": 1.83, "tokens": 2911, "trained_tokens": 402, "learning_rate": 1.7e-4, "seconds": 9.2}

`tokens` and `trained_tokens` count the step over all workers, padding left out; `seconds` is the step's own time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a last line still being written is left out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
