"""Errors as OpenAI error objects: `{"error": {"message", "type", "param", "code"}}` and a status.

Every error has a code, which clients may rely on; docs/serving.md lists them all.

    400 invalid_request_error   a parameter is wrong, unknown or not supported (`param` names it); a prompt is too long
    401 authentication_error    the key is missing or wrong
    403 permission_error        the key may not use `/admin`
    404 invalid_request_error   there is no such model (code `model_not_found`) or no such page
    413 invalid_request_error   the body is larger than the server's limit (code `body_too_large`)
    429 rate_limit_error        a limit of the server or of the key is reached; `Retry-After` says when to try again
    502 engine_error            a model engine could not answer
    503 quorum_not_met          a layer has too few usable answers to aggregate
    503 unavailable             the server is shutting down or restarting; `Retry-After` says when to try again
    504 deadline_exceeded       the plan's deadline passed
    500 internal_error          anything else; the text is generic, the log has the request id and the traceback

The stock `openai` client raises them as its own classes (BadRequestError, AuthenticationError, NotFoundError,
InternalServerError).
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from aft_ray.errors import (
    AftError,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    InputError,
    InvalidSchema,
    PromptTooLong,
    QuorumNotMet,
)
from aft_ray.serving.openai.schema import Error, ErrorBody

logger = logging.getLogger("ray.serve.aft_ray")

INVALID = "invalid_request_error"
LONGEST_MESSAGE = 500
"""Maximum characters of a message that may quote the body."""


class HttpError(AftError):
    """An error that ends a request with an HTTP status and an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        type: str = INVALID,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        """Seconds after which to send the same request again (the `Retry-After` header)."""
        self.headers = dict(headers or {})
        self.body = ErrorBody(error=Error(message=message, type=type, param=param, code=code))

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the keyword arguments when Ray pickles the error: pickle restores positional arguments only."""
        return partial(HttpError, code=""), (self.status, str(self)), self.__dict__  # `__dict__` has the code


def as_http_error(error: Exception, request_id: str) -> HttpError:
    """Return the error object of anything that a request may raise. Log unexpected errors, without any prompt."""
    expected = _of_expected(error)
    if expected is not None:
        return expected
    # an exception's text may quote a prompt, so the log gets its class and its traceback without the text
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s: unexpected %s\n%s", request_id, type(error).__name__, frames)
    message = f"The server could not answer this request. Its log has the details of request {request_id}."
    return HttpError(500, message, code="internal_error", type="internal_error")


def code_of(error: Exception) -> str:
    """Return the code of the error object."""
    expected = _of_expected(error)
    return "internal_error" if expected is None else expected.body.error.code


def _of_expected(error: Exception) -> HttpError | None:
    match error:
        case HttpError():
            return error
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException():
            # `not_found`, `method_not_allowed`; Python has two names for 413
            code = "body_too_large" if error.status_code == 413 else HTTPStatus(error.status_code).name.lower()
            return HttpError(error.status_code, str(error.detail), code=code)
        case PromptTooLong():
            # these words are what proxies recognise, which then try a model with a larger window
            message = f"This model's maximum context length is exceeded: {error}"
            return HttpError(400, message, param="messages", code="context_length_exceeded")
        case InvalidSchema():
            return HttpError(400, str(error), param="response_format", code="invalid_value")
        case ConfigError() | InputError():
            return HttpError(400, without_paths(str(error)), code="invalid_value")
        case DeadlineExceeded():
            return HttpError(504, str(error), code="deadline_exceeded", type="deadline_exceeded")
        case QuorumNotMet():
            return HttpError(503, without_paths(str(error)), code="quorum_not_met", type="quorum_not_met")
        case EngineError():
            return HttpError(502, without_paths(str(error)), code="engine_error", type="engine_error")
    return None


ADDRESS = re.compile(
    r"https?://[^\s'\"()<>]+|\b(?:\d{1,3}\.){3}\d{1,3}(?::\d+)?\b|\b(?:localhost|[\w-]+(?:\.[\w-]+)+):\d{2,5}\b"
)


def without_paths(text: str) -> str:
    """Return an engine's message with the last part of each path only, and without addresses of other servers.

    Where the server keeps things, and whom it asks, is its own.
    """
    text = ADDRESS.sub("<address>", text)
    return re.sub(r"(?<![\w/:.])(?:[a-z0-9]+:/)?(?:/[\w.@+=-]+){2,}", lambda found: found[0].rpartition("/")[2], text)


def _of_validation(error: RequestValidationError) -> HttpError:
    """Return the first error in a body. The context of a refused or unknown parameter holds the parameter's name."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return HttpError(400, "the body is not valid JSON", code="invalid_json")
    if first["type"] == "invalid_json":  # of `openai/body.py`, which says more
        return HttpError(400, first["msg"], code="invalid_json")
    named = first.get("ctx", {}).get("param")
    # Of a value of several types, pydantic adds the type that it tried last, such as `constrained-str` or `list[int]`.
    path = [part for part in first["loc"][1:] if isinstance(part, int) or re.fullmatch(r"[a-z][a-z0-9_]*", part)]
    param = named or ".".join(map(str, path)) or None
    message = first["msg"].removeprefix("Value error, ")
    if not named:
        message = f"{param or 'body'}: {message[0].lower()}{message[1:]}"
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."
    return HttpError(400, message, param=param, code=first["type"] if named else "invalid_value")
