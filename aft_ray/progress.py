"""Progress of long work: a bar on a terminal, and elsewhere a line every few seconds.

with Progress("proposals", total=96, unit="rows") as progress:
    progress.update(done=12, failed=0, tokens=4711)
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

LINE_EVERY_S = 5.0
SHORTEST_S = 1.0
"""Seconds of work below which a rate would say nothing."""


class Progress:
    """Shows the work done and its total, failures, tokens per second and the time left."""

    def __init__(self, name: str, total: int, unit: str = "rows") -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self.failed = self.tokens = self.already = 0
        self.note = "starting"
        self.working_since = 0.0
        """When the workers were ready. Rates and the time left are counted from here, so that start-up is left out."""
        self.start = time.monotonic()
        self._stop = threading.Event()
        self._on_terminal = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def update(
        self,
        *,
        done: int,
        failed: int = 0,
        tokens: int = 0,
        note: str = "",
        already: int = 0,
        working_s: float | None = None,
    ) -> None:
        """Set the counts so far.

        `already` of the `done` were there before this attempt, and count in no rate. `working_s` is for how long there
        have been workers; without it, that is counted from the first note that does not begin with "starting".
        """
        if working_s:
            self.working_since = time.monotonic() - working_s
        elif not self.working_since and not note.startswith("starting"):
            self.working_since = time.monotonic()
        self.done, self.failed, self.tokens, self.note, self.already = done, failed, tokens, note, already

    def line(self) -> str:
        """Return the state as one line of text."""
        now = time.monotonic()
        seconds = now - self.start
        working = now - (self.working_since or now)
        new = self.done - self.already
        parts = [f"{self.done}/{self.total} {self.unit}"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.tokens and working >= SHORTEST_S:
            parts.append(f"{self.tokens / working:,.0f} tok/s")
        if new > 0 and self.done < self.total and working >= SHORTEST_S:
            parts.append(f"{working / new * (self.total - self.done):.0f} s left")
        if self.note:
            parts.append(self.note)
        return f"{self.name:<13} {seconds:5.0f} s  " + ", ".join(parts)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.note = ""
        if kind is not None:
            self.note = "stopped" if issubclass(kind, KeyboardInterrupt) else f"stopped: {kind.__name__}"
        print(self.line(), file=sys.stderr, flush=True)

    def _show(self) -> None:
        if self._on_terminal:
            self._show_bar()
            return
        while not self._stop.wait(LINE_EVERY_S):
            print(self.line(), file=sys.stderr, flush=True)

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn
        from rich.progress import Progress as Bars

        with Bars("{task.description}", BarColumn(), console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(self.line(), total=self.total)
            while not self._stop.wait(0.25):
                bars.update(task, completed=self.done, description=self.line())
