"""The metrics files of a training. The first worker writes them line by line, and the driver reads them meanwhile.

    metrics.jsonl    one line per optimizer step
        {"step": 12, "loss": 1.83, "tokens": 2911, "trained_tokens": 402, "learning_rate": 1.7e-4, "seconds": 9.2}
    held_out.jsonl   one line every `training.eval_steps` steps (held_out.py)

`tokens` and `trained_tokens` are counts over all workers, without padding; `seconds` is the time of the step alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aft_ray.storage import write_text


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the complete lines of such a file. A last line that is still being written is left out."""
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def append_metrics(file: Path, row: dict[str, Any]) -> None:
    """Append one line."""
    with file.open("a") as lines:
        lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def drop_after(file: Path, step: int) -> None:
    """Drop the lines of the steps that a resumed training is about to repeat, so that the file reads as one run."""
    kept = [row for row in read_metrics(file) if row["step"] <= step]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
