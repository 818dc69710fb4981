"""No body larger than the server's limit is ever held in memory: reading stops at the limit with a 413."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message


def limited(request: Request, max_bytes: int) -> Request:
    """The request, whose body cannot be read beyond `max_bytes`. Raises HTTPException 413, here where the client says
    how long its body is, else while it is read."""
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and (len(stated) > 18 or int(stated) > max_bytes):
        raise too_large(max_bytes)
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        message = await request.receive()
        num_read += len(message.get("body", b""))
        if num_read > max_bytes:
            raise too_large(max_bytes)
        return message

    return Request(request.scope, receive, request._send)


def too_large(max_bytes: int) -> HTTPException:
    """A 413 that names the limit."""
    return HTTPException(413, f"the body is larger than max_body_bytes {max_bytes} of this server")
