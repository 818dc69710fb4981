"""The events of a run as a reply: in one piece, or as server-sent events. The client may disconnect at any moment."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from aft_ray.inference.events import AnswerDelta, Event, Finished
from aft_ray.serving.errors import as_http_error
from aft_ray.serving.http.joined_calls import JoinedCalls
from aft_ray.serving.openai.response import SSE_KEEP_ALIVE, Drafts, Reply
from aft_ray.serving.running_call import RunningCall

KEEP_ALIVE_S = 2.0
"""A stream is never silent for longer, because proxies close idle connections."""


async def whole_reply(reply: Reply, running: RunningCall | JoinedCalls) -> BaseModel:
    """Return the reply of a run in one piece."""
    drafts = Drafts()
    try:
        while True:
            event = await running.next(KEEP_ALIVE_S)
            if event is not None:
                drafts.add(event)
            if isinstance(event, Finished):
                return reply.whole(event, drafts)
    except BaseException:
        running.stop()
        raise


async def begun_stream(reply: Reply, running: RunningCall | JoinedCalls, headers: Mapping[str, str]) -> EventStream:
    """Return the reply of a run as server-sent events, once its first event is there or has taken long enough.

    What is wrong with a request from the start, such as a prompt that does not fit, is so still told by a status.
    """
    try:
        first = await running.next(KEEP_ALIVE_S)
    except BaseException:
        running.stop()
        raise
    return EventStream(streamed_reply(reply, running, first), running, headers)


async def streamed_reply(
    reply: Reply, running: RunningCall | JoinedCalls, first: Event | None
) -> AsyncGenerator[str, None]:
    """Yield the reply as server-sent events, from the first event of the run on. Whatever happens, it is ended."""
    drafts = Drafts()
    yield reply.opening()
    event = first
    try:
        while True:
            match event:
                case None:
                    yield SSE_KEEP_ALIVE
                case AnswerDelta():
                    if event.text or event.reasoning or event.tool_calls or event.logprobs:
                        yield reply.piece(event)
                case Finished():
                    drafts.add(event)
                    yield reply.closing(event, drafts)
                    break
                case _:
                    drafts.add(event)
                    if reply.call.progress:
                        yield reply.progress(event, drafts)
            event = await running.next(KEEP_ALIVE_S)
    except Exception as error:  # process boundary: the status line was sent already, so the error travels in the stream
        yield reply.failed(as_http_error(error, reply.request_id).body.error)
    yield reply.END


class EventStream(StreamingResponse):
    """Server-sent events. When the client disconnects, the generator is closed at once, wherever it is."""

    media_type = "text/event-stream"

    def __init__(
        self, content: AsyncGenerator[str, None], running: RunningCall | JoinedCalls, headers: Mapping[str, str]
    ) -> None:
        super().__init__(content, headers=headers)
        self._running = running

    async def stream_response(self, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # even if the client disconnected before the first byte, when the body was never started
            self._running.stop()
