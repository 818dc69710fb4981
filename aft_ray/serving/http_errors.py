"""What went wrong, as OpenAI error objects: `{"error": {"message", "type", "param", "code"}}` and a status.

    400 invalid_request_error   a parameter is wrong, unknown or not honoured (`param` names it), a prompt too long
    401 authentication_error    no key, or a wrong one
    403 permission_error        a key that may not use `/admin`
    404 invalid_request_error   no such model (code `model_not_found`) or no such page
    413 invalid_request_error   the body is larger than the server's limit (code `body_too_large`)
    429 rate_limit_error        over a limit of the server or of the key; `Retry-After` says when to come again
    502 engine_error            a model engine could not answer
    503 quorum_not_met          too few usable proposals to aggregate
    503 unavailable             the server is shutting down or starting again; `Retry-After`
    504 deadline_exceeded       the plan's deadline passed
    500 internal_error          anything else; the text is generic, the log has the request id and the traceback

The stock `openai` client turns them into its own classes (BadRequestError, AuthenticationError, NotFoundError,
InternalServerError).
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from aft_ray.errors import AftError, ConfigError, DeadlineExceeded, EngineError, InputError, PromptTooLong, QuorumNotMet

logger = logging.getLogger("ray.serve.aft_ray")

INVALID = "invalid_request_error"
LONGEST_MESSAGE = 500
"""Characters of a message that may quote the body."""


class HttpError(AftError):
    """A request ends with this status and error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = INVALID,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        """Seconds after which the same request may be answered (the `Retry-After` header)."""
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def __reduce__(self) -> tuple[Any, ...]:
        """Ray moves it between processes; an exception is made again from its positional arguments alone."""
        return HttpError, (self.status, str(self)), self.__dict__


def as_http_error(error: Exception, request_id: str) -> HttpError:
    """The error object of anything a request may raise. Unexpected errors are logged here, without any prompt."""
    expected = _of_expected(error)
    if expected is not None:
        return expected
    # An exception's text may quote a prompt: the log gets its class and where it came from.
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s: unexpected %s\n%s", request_id, type(error).__name__, frames)
    message = f"The server could not answer this request. Its log has the details of request {request_id}."
    return HttpError(500, message, code="internal_error", type="internal_error")


def code_of(error: Exception) -> str:
    """The word for what went wrong: the error object's code, `invalid_request_error` where it has none."""
    expected = _of_expected(error)
    return "internal_error" if expected is None else str(expected.body["error"]["code"] or INVALID)


def _of_expected(error: Exception) -> HttpError | None:
    match error:
        case HttpError():
            return error
        case RequestValidationError():
            return _of_validation(error)
        case HTTPException():
            code = "body_too_large" if error.status_code == 413 else None
            return HttpError(error.status_code, str(error.detail), code=code)
        case PromptTooLong():
            return HttpError(400, str(error), param="messages", code="context_length_exceeded")
        case ConfigError() | InputError():
            return HttpError(400, str(error))
        case DeadlineExceeded():
            return HttpError(504, str(error), code="deadline_exceeded", type="deadline_exceeded")
        case QuorumNotMet():
            return HttpError(503, str(error), code="quorum_not_met", type="quorum_not_met")
        case EngineError():
            return HttpError(502, str(error), code="engine_error", type="engine_error")
    return None


def _of_validation(error: RequestValidationError) -> HttpError:
    """The first thing wrong with a body. A refused or unknown parameter names itself in the error's context."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return HttpError(400, "the body is not valid JSON", code="invalid_json")
    named = first.get("ctx", {}).get("param")
    param = named or ".".join(str(part) for part in first["loc"][1:]) or None
    message = first["msg"].removeprefix("Value error, ")
    if not named:
        message = f"{param or 'body'}: {message[0].lower()}{message[1:]}"
    message = message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."
    return HttpError(400, message, param=param, code=first["type"] if named else "invalid_value")
