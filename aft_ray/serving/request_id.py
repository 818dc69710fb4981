"""One id for a request, in every log line about it, in its errors and in the reply's `x-request-id`.

The client's own `x-request-id`, where it sent one that is fit for a log; else Serve's, else one made here. Engine
requests carry it in front of what makes them unique, so the logs of a replica can be searched for it too.
"""

from __future__ import annotations

import re
import uuid

from fastapi import Request, Response

HEADER = "x-request-id"


def request_id_of(request: Request) -> str:
    """The same id however often it is asked for."""
    known = getattr(request.state, "request_id", None)
    if known is None:
        stated = request.headers.get(HEADER, "")
        known = stated if re.fullmatch(r"[\w.:/+=-]{1,128}", stated, re.ASCII) else uuid.uuid4().hex
        request.state.request_id = known
    return str(known)


def tell_request_id(request: Request, response: Response) -> Response:
    """The response with the id. Serve, which gives every request one, adds it to the response by itself."""
    if HEADER not in request.headers:
        response.headers[HEADER] = request_id_of(request)
    return response
