"""What training writes while it runs, one JSON line each, by the first worker; the driver reads along.

    metrics.jsonl    every optimizer step
        {"step": 12, "loss": 1.83, "tokens": 2911, "trained_tokens": 402, "learning_rate": 1.7e-4, "seconds": 9.2}
    held_out.jsonl   every `training.eval_steps` steps (held_out.py)

`tokens` and `trained_tokens` count the step over all workers, padding left out; `seconds` is the step's own time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aft_ray.storage import write_text


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of such a file; a last line still being written is left out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_metrics(file: Path, row: dict[str, Any]) -> None:
    """Adds one line."""
    with file.open("a") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def forget_after(file: Path, step: int) -> None:
    """Drops the lines of steps that a resumed training is about to do again, so the file always reads as one run."""
    kept = [row for row in read_metrics(file) if row["step"] <= step]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
