"""How many calls an endpoint bears at a time, learnt from its replies, and the pauses that it asks for."""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections.abc import Mapping

BACKOFF_S = 1.0
"""The limit is halved at most once in this many seconds: several 429s at once are one signal."""


class AdaptiveLimit:
    """The limit on concurrent calls: a 429 halves it, and a round of successes raises it by one (AIMD).

    `hold` lets no call begin for a while: a pause that the endpoint asks one caller for concerns all of them.
    """

    def __init__(self, largest: int) -> None:
        self.largest, self.allowed = largest, float(largest)
        self.running = 0
        self.num_answered = 0
        """Number of calls that were not refused."""
        self._last_cut = self._held_until = float("-inf")
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> None:
        while True:
            await asyncio.sleep(max(0.0, self.pause_s))
            async with self._changed:
                await self._changed.wait_for(lambda: self.running < int(self.allowed))
                if self.pause_s <= 0:
                    self.running += 1
                    return

    async def __aexit__(self, *_: object) -> None:
        async with self._changed:
            self.running -= 1
            self._changed.notify_all()

    @property
    def pause_s(self) -> float:
        """Seconds until the next call may begin; 0 or less where it may now."""
        return self._held_until - asyncio.get_running_loop().time()

    def hold(self, seconds: float) -> None:
        """Let no call begin for `seconds`. A longer pause that was asked for before stays."""
        self._held_until = max(self._held_until, asyncio.get_running_loop().time() + seconds)

    def adapt(self, status: int) -> None:
        """Adapt the limit to the status of one response."""
        if status == 429:
            now = asyncio.get_running_loop().time()
            if now - self._last_cut >= BACKOFF_S:
                self.allowed, self._last_cut = max(1.0, self.allowed / 2), now
        elif status < 400:
            self.num_answered += 1
            self.allowed = min(self.largest, self.allowed + 1 / self.allowed)


def pause_asked_for(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait (`Retry-After`, in seconds or as a date), or None."""
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    asked = headers.get("retry-after", "")
    seconds = _number(asked)
    if seconds is not None:
        return seconds
    try:
        return max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None
