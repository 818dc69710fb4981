"""Decides whether this ingress replica is ready: its engines have just answered somebody, or answer a probe."""

from __future__ import annotations

import asyncio
import time

from aft_ray.serving.run_request import Answers

READY_S = 5.0
"""How long the engines may take for the one-token probe of `/ready`."""
READY_FOR_S = 2.0
"""How long the outcome of a probe holds for all who ask, so that asking often costs nothing."""


class Readiness:
    """Whether the engines answer. Those that have just answered somebody are not asked."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._probe: asyncio.Task[None] | None = None
        self._probed = -READY_FOR_S
        self.last_event = -READY_S
        """When an engine was last heard of."""
        self.num_running = 0
        """Number of runs under way at this ingress replica."""

    async def check(self) -> None:
        """Return if the engines answer. Raises TimeoutError, or what the probe raised.

        Engines that are too busy to answer the probe in time are ready as long as runs are under way: Serve itself
        replaces a replica whose engine writes nothing.
        """
        now = time.monotonic()
        if now - self.last_event < READY_S:
            return
        if self._probe is None or (self._probe.done() and now - self._probed > READY_FOR_S):
            self._probed = now
            self._probe = asyncio.create_task(self._ask())
        await asyncio.shield(self._probe)

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(READY_S):
                await self._answers.probe()
        except TimeoutError:
            if not self.num_running:
                raise
