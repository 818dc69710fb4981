"""The events of a run as a reply: in one piece, or as server-sent events. The client may disconnect at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from aft_ray.errors import DeadlineExceeded
from aft_ray.inference.events import AnswerDelta, Event, Finished
from aft_ray.serving.http_errors import as_http_error, code_of
from aft_ray.serving.ledger import OpenRequest
from aft_ray.serving.openai_request import LONGEST_REQUEST_S
from aft_ray.serving.openai_response import SSE_DONE, SSE_KEEP_ALIVE, Drafts, Reply, sse_data
from aft_ray.serving.service import Service

KEEP_ALIVE_S = 2.0
"""A stream is never silent for longer, because proxies close idle connections."""


async def with_keep_alives(
    events: AsyncGenerator[Event, None], interval_s: float
) -> AsyncGenerator[Event | None, None]:
    """Yield the events, and None whenever `interval_s` has passed without one. Raises what the events raise.

    One task reads the events from beginning to end, because a timeout inside the run must stay in one task. Closing
    this generator cancels that task and waits until the run has released its engines.
    """
    inbox: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
    reader = asyncio.create_task(_read(events, inbox))
    try:
        while True:
            try:
                async with asyncio.timeout(interval_s):
                    item = await inbox.get()
            except TimeoutError:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(events: AsyncGenerator[Event, None], inbox: asyncio.Queue[Event | Exception | None]) -> None:
    clock = asyncio.timeout(LONGEST_REQUEST_S)
    try:
        async with clock, aclosing(events):
            async for event in events:
                inbox.put_nowait(event)
        inbox.put_nowait(None)
    except Exception as error:  # passed on to the reader of the inbox, which raises it
        late = DeadlineExceeded(f"the request took longer than {LONGEST_REQUEST_S:g} s")
        inbox.put_nowait(late if clock.expired() else error)


async def whole_reply(service: Service, reply: Reply, opened: OpenRequest) -> dict[str, Any]:
    """Run the call and return its reply in one piece."""
    drafts = Drafts()
    try:
        async with aclosing(with_keep_alives(service.run(reply.call, reply.run_id, opened), KEEP_ALIVE_S)) as events:
            async for event in events:
                if event is not None:
                    drafts.add(event)
                if isinstance(event, Finished):
                    opened.bill.status = "answered"
                    return reply.whole(event, drafts)
    except Exception as error:
        opened.bill.failed(code_of(error))
        raise
    finally:
        opened.close()
    raise AssertionError("a run ended without an answer and without an error")


async def streamed_reply(service: Service, reply: Reply, opened: OpenRequest) -> AsyncGenerator[str, None]:
    """Yield the reply as server-sent events. Whatever happens, the last one is `[DONE]`."""
    drafts = Drafts()
    yield sse_data(reply.opening())
    try:
        async with aclosing(with_keep_alives(service.run(reply.call, reply.run_id, opened), KEEP_ALIVE_S)) as events:
            async for event in events:
                match event:
                    case None:
                        yield SSE_KEEP_ALIVE
                    case AnswerDelta():
                        yield sse_data(reply.piece(event))
                    case Finished():
                        opened.bill.status = "answered"
                        drafts.add(event)
                        for chunk in reply.closing(event, drafts):
                            yield sse_data(chunk)
                    case _:
                        drafts.add(event)
                        if reply.call.progress:
                            yield reply.progress(event, drafts)
    except Exception as error:  # process boundary: the status line was sent already, so the error travels in the stream
        opened.bill.failed(code_of(error))
        yield sse_data(as_http_error(error, reply.request_id).body)
    yield SSE_DONE


class EventStream(StreamingResponse):
    """Server-sent events. When the client disconnects, the generator is closed at once, wherever it is."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[str, None], opened: OpenRequest) -> None:
        super().__init__(content)
        self._opened = opened

    async def stream_response(self, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # even if the client disconnected before the first byte, when the body was never started
            self._opened.close()
