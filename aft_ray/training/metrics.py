"""The metrics files of a training. The first worker writes them line by line, and the driver reads them meanwhile.

    metrics.jsonl    one line per optimizer step
        {"step": 12, "loss": 1.83, "tokens": 2911, "trained_tokens": 402, "learning_rate": 1.7e-4, "seconds": 9.2}
    held_out.jsonl   one line every `training.eval_steps` steps (held_out.py)

`tokens` and `trained_tokens` are counts over all workers, without padding; `seconds` is the time of the step alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aft_ray.storage import Folder

METRICS = "metrics.jsonl"
HELD_OUT = "held_out.jsonl"

UPLOAD_S = 5.0
"""Least seconds between two uploads of a file to object storage, which cannot append."""


def has_stopped_early(held_out: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the last line of held_out.jsonl ended the training (`training.early_stopping_patience`)."""
    return bool(held_out) and bool(held_out[-1].get("stops"))


class MetricsFile:
    """Such a file, open for its only writer."""

    def __init__(self, folder: Folder, name: str = METRICS) -> None:
        self.folder, self.name = folder, name
        self._rows: list[dict[str, Any]] = []
        self._written_at = 0.0

    def begin(self, step: int) -> None:
        """Drop the lines of the steps that a resumed training is about to repeat, so that the file reads as one run."""
        self._rows = [row for row in self.folder.json_lines(self.name) if row["step"] <= step]
        self._write()

    def append(self, row: dict[str, Any]) -> None:
        """Append one line. On object storage it appears within seconds, at the latest with the next `flush`."""
        if self.folder.is_local:
            self.folder.append_line(self.name, json.dumps(row, ensure_ascii=False))
            return
        self._rows.append(row)
        if time.monotonic() - self._written_at > UPLOAD_S:
            self._write()

    def flush(self) -> None:
        """Make all lines appear."""
        if not self.folder.is_local:
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
        self.folder.write_bytes(self.name, text.encode())
        self._written_at = time.monotonic()
