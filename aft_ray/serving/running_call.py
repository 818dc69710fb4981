"""A run between the engines that write it and the reply that sends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from aft_ray.errors import DeadlineExceeded
from aft_ray.inference.events import Event, Finished
from aft_ray.serving.errors import code_of
from aft_ray.serving.limits.ledger import OpenRequest
from aft_ray.serving.metrics import METRICS
from aft_ray.serving.openai.request import LONGEST_REQUEST_S, ChatCall
from aft_ray.serving.readiness import Readiness


class RunningCall:
    """Reads the events of a run to their end, in one task, and then closes its request with the whole bill.

    A client may leave at any moment, and its reply with it. The task goes on for as long as the engines take to stop
    and to say what they have cost.
    """

    def __init__(
        self, events: AsyncGenerator[Event, None], call: ChatCall, opened: OpenRequest, readiness: Readiness
    ) -> None:
        self._call = call
        self._opened = opened
        self._readiness = readiness
        self._inbox: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(events))

    async def next(self, patience_s: float | None) -> Event | None:
        """Return the next event, or None when there is none for so long. Raises what ended the run."""
        if self._inbox.empty():
            try:
                async with asyncio.timeout(patience_s):
                    item = await self._inbox.get()
            except TimeoutError:
                return None
        else:
            item = self._inbox.get_nowait()
        if isinstance(item, Exception):
            raise item
        return item

    def stop(self) -> None:
        """End the run, if it has not ended: nobody reads it any more."""
        if not self._task.cancelling():
            self._task.cancel()

    def when_ended(self, call: Callable[[], None]) -> None:
        """Call `call` when the run has ended and its request is closed."""
        self._task.add_done_callback(lambda _: call())

    async def _read(self, events: AsyncGenerator[Event, None]) -> None:
        bill = self._opened.bill
        self._readiness.num_running += 1
        try:
            with METRICS.run(self._call) as measure:
                async with limited_to(LONGEST_REQUEST_S), aclosing(events):
                    async for event in events:
                        self._readiness.last_event = time.monotonic()
                        measure(event)
                        if isinstance(event, Finished):
                            bill.status = "answered"
                        self._inbox.put_nowait(event)
        except Exception as error:  # passed on to the reader of the inbox, which raises it
            bill.failed(code_of(error))
            self._inbox.put_nowait(error)
        finally:
            self._readiness.num_running -= 1
            self._opened.close()


@asynccontextmanager
async def limited_to(seconds: float) -> AsyncIterator[None]:
    """Raise DeadlineExceeded where the block takes longer."""
    clock = asyncio.timeout(seconds)
    try:
        async with clock:
            yield
    except TimeoutError:
        if not clock.expired():
            raise  # the timeout is another one's
        raise DeadlineExceeded(f"the request took longer than {seconds:g} s") from None
