"""Several coroutines, one stream: the concurrency of propose-and-aggregate and of the engines.

    async with aclosing(fan_in([writer_a, writer_b])) as items:
        async for item in items:          # each item, as soon as a writer emits it
            ...

Each writer runs in its own task and receives an `emit` function. An exception that ends a writer is raised by the
stream unchanged. However the stream ends (all writers done, an exception, `aclose`, a cancelled consumer), every task
is cancelled and awaited first, so nothing is left running. No timeout surrounds a `yield`, so this module never cancels
what the consumer awaits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
Emit = Callable[[T], None]
Writer = Callable[[Emit[T]], Coroutine[Any, Any, None]]


async def fan_in(writers: Sequence[Writer[T]]) -> AsyncGenerator[T, None]:
    """Yield what the writers emit, in the order emitted, until all of them have ended."""
    items: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(writer(items.put_nowait)) for writer in writers]
    for task in tasks:
        task.add_done_callback(items.put_nowait)  # comes after everything the writer emitted: a queued task has ended
    num_running = len(tasks)
    try:
        while num_running:
            item = await items.get()
            if isinstance(item, asyncio.Task):
                item.result()  # raises what ended it, if anything did
                num_running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def all_of(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of several coroutines that run at once, in order. The first one that fails ends the others."""
    if len(work) == 1:
        return [await work[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
