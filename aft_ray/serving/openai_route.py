"""Routes whose every error is an OpenAI error object."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from aft_ray.serving.body_limit import limited
from aft_ray.serving.http_errors import HttpError, as_http_error, code_of
from aft_ray.serving.metrics import METRICS
from aft_ray.serving.request_id import request_id_of, tell_request_id


class OpenAIRoute(APIRoute):
    """A route whose every error is an OpenAI error object."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handler(limited(request, request.app.state.max_body_bytes))
            except Exception as error:  # process boundary: as_http_error logs what is unexpected
                if isinstance(error, (HttpError, HTTPException, RequestValidationError)):  # a run raises none of them
                    METRICS.rejected(code_of(error))
                response = error_response(as_http_error(error, request_id_of(request)))
            return tell_request_id(request, response)

        return answer


def error_response(error: HttpError) -> JSONResponse:
    """The error as OpenAI clients expect it, with the challenge that a 401 owes (RFC 9110, 11.6.1)."""
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    return JSONResponse(error.body, error.status, headers)
