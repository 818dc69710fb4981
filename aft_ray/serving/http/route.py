"""What every HTTP route does around its own work: limit the body, name the request, answer errors as OpenAI does.

A request has one id: in every log line about it, in its errors, and in the reply's `x-request-id` header. It is the
client's own `x-request-id` where that is fit for a log, else the one that Serve gave it, else a new one. Engine
requests begin with it, so the logs of a replica can be searched for it too.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Message

from aft_ray.serving.errors import HttpError, as_http_error, code_of
from aft_ray.serving.metrics import METRICS
from aft_ray.serving.openai.schema import encoded

REQUEST_ID = "x-request-id"


class OpenAIRoute(APIRoute):
    """A route whose errors are all OpenAI error objects. Its body is limited to the app's `max_body_bytes`."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handler(limited(request, request.app.state.max_body_bytes))
            except Exception as error:  # process boundary: as_http_error logs what is unexpected
                if isinstance(error, (HttpError, HTTPException, RequestValidationError)):  # a run raises none of them
                    METRICS.rejected(code_of(error))
                response = error_response(as_http_error(error, request_id_of(request)))
            return with_request_id(request, response)

        return answer


async def unrouted_error(request: Request, error: Exception) -> Response:
    """Answer an error that belongs to no route, such as 404 and 405, as an OpenAI error object."""
    response = error_response(as_http_error(error, request_id_of(request)))
    response.headers.update(getattr(error, "headers", None) or {})  # a 405 must list the allowed methods
    return with_request_id(request, response)


def json_response(reply: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a reply in one piece."""
    return Response(encoded(reply), status, headers, media_type="application/json")


def error_response(error: HttpError) -> Response:
    """Return the error as OpenAI clients expect it. A 401 must carry a challenge (RFC 9110, 11.6.1)."""
    headers = error.headers | ({"www-authenticate": "Bearer"} if error.status == 401 else {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    return json_response(error.body, error.status, headers)


def request_id_of(request: Request) -> str:
    """Return the id of a request; every call returns the same one."""
    known = getattr(request.state, "request_id", None)
    if known is None:
        sent = request.headers.get(REQUEST_ID, "")
        known = sent if re.fullmatch(r"[\w.:/+=-]{1,128}", sent, re.ASCII) else uuid.uuid4().hex
        request.state.request_id = known
    return str(known)


def with_request_id(request: Request, response: Response) -> Response:
    """Add the id to the response, unless the request came with one: then Serve adds it by itself."""
    if REQUEST_ID not in request.headers:
        response.headers[REQUEST_ID] = request_id_of(request)
    return response


def limited(request: Request, max_bytes: int) -> Request:
    """Return the request with a body that cannot be read beyond `max_bytes`, so that no larger one is held in memory.

    Raises HTTPException 413: here, where the client declares the length of its body, else while the body is read.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
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
    """Return a 413 that names the limit."""
    return HTTPException(413, f"the body is larger than this server's limit, max_body_bytes {max_bytes}")
