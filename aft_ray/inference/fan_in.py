"""Several coroutines, one stream: the only concurrency under propose-and-aggregate.

    async with aclosing(fan_in([writer_a, writer_b])) as items:
        async for item in items:          # whatever a writer tells, as it tells it
            ...

Each writer runs as its own task and gets a `tell` function. An exception that ends a writer comes out of the stream as
it is. However the stream ends (all writers done, an exception, `aclose`, a cancelled consumer), every task is cancelled
and awaited before it is over: nothing is left running. No timeout surrounds a `yield`, so the consumer's own awaits
are never cancelled by us.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Tell = Callable[[T], None]
Writer = Callable[[Tell[T]], Coroutine[Any, Any, None]]


async def fan_in(writers: Sequence[Writer[T]]) -> AsyncGenerator[T, None]:
    """Yield what the writers tell, in the order told, until all of them have ended."""
    told: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(writer(told.put_nowait)) for writer in writers]
    for task in tasks:
        task.add_done_callback(told.put_nowait)  # comes after all that the writer told: a task in the queue has ended
    num_running = len(tasks)
    try:
        while num_running:
            item = await told.get()
            if isinstance(item, asyncio.Task):
                item.result()  # raises what ended it, if anything did
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
