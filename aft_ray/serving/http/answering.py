"""How a route answers: what the body asks for is resolved, admitted and run, and replied in one piece or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from http import HTTPStatus
from urllib.parse import quote

from fastapi import Request, Response

from aft_ray.fan_in import all_of
from aft_ray.serving.errors import HttpError, code_of
from aft_ray.serving.http.joined_calls import JoinedCalls
from aft_ray.serving.http.replies import begun_stream, whole_reply
from aft_ray.serving.http.route import json_response, request_id_of
from aft_ray.serving.limits.keys import Caller
from aft_ray.serving.limits.ledger import OpenRequest
from aft_ray.serving.openai.body import ChatBody, CompletionBody
from aft_ray.serving.openai.request import ChatCall, call_of, check_ids, echoing, fitted_to_engines
from aft_ray.serving.openai.response import Reply
from aft_ray.serving.service import Service

IGNORED = "x-aft-ignored"
"""The header that names the parameters which the server was told to ignore (`serving.unknown_fields`)."""


async def resolved(service: Service, body: ChatBody | CompletionBody) -> ChatCall:
    """Return the call that a body asks for. Raises HttpError 400 or 404."""
    try:
        return call_of(body, service.current_config)
    except HttpError as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
    await service.gate.renew()  # another ingress replica may have received this name a moment ago
    return call_of(body, service.current_config)


async def calls_of_prompts(service: Service, body: CompletionBody) -> list[ChatCall]:
    """Return a call for each prompt of a text completion. Prompts that came as ids become text."""

    info = service.answers.info

    async def call_for(prompt: str | tuple[int, ...]) -> ChatCall:
        if not isinstance(prompt, str):
            check_ids(prompt, info.aggregator_vocabulary, "prompt")
            check_ids(prompt if body.echo else (), info.single_vocabulary, "prompt")
        text = prompt if isinstance(prompt, str) else await service.answers.text_of(prompt)
        call = await resolved(service, body.of_text(text))
        return echoing(call, prompt) if body.echo else call

    return await all_of([call_for(prompt) for prompt in body.prompts()])


async def reply_to(
    service: Service, calls: Sequence[ChatCall], make: Callable[..., Reply], prefix: str, request: Request, key: Caller
) -> Response:
    """Admit the calls of one request, all or none, run them, and return their reply."""
    unknown = service.config.unknown_fields
    calls = [fitted_to_engines(call, service.answers.info, unknown) for call in calls]
    first, request_id = calls[0], request_id_of(request)
    reply = make(
        calls=tuple(calls),
        id=f"{prefix}{uuid.uuid4().hex}",
        created=int(time.time()),
        request_id=request_id,
        counted=service.config.usage,
    )
    # a request id alone will not do as the name of a run: a client may send one twice
    ids = [reply.id if place == 0 else f"{reply.id}-{place}" for place in range(len(calls))]
    trace = None if service.traces is None else service.traces.request(calls, request_id, request.headers)
    try:
        opened = await opened_all(service, calls, key, request_id, ids)
    except BaseException as error:
        if trace is not None:
            trace.refused(code_of(error) if isinstance(error, Exception) else "cancelled")
        raise
    parent = None if trace is None else trace.parent
    runs = [
        service.start(call, f"{request_id}/{run_id}", one, parent)
        for call, run_id, one in zip(calls, ids, opened, strict=True)
    ]
    if trace is not None:
        trace.admitted(runs, opened)
    running = runs[0] if len(runs) == 1 else JoinedCalls(runs, first.plan, first.final.num_choices)
    headers = dict(opened[-1].room.headers)
    if first.ignored:
        headers[IGNORED] = ", ".join(map(quote, first.ignored))
    if first.stream:
        return await begun_stream(reply, running, headers)
    return json_response(await whole_reply(reply, running), headers=headers)


async def opened_all(
    service: Service, calls: Sequence[ChatCall], key: Caller, request_id: str, ids: Sequence[str]
) -> list[OpenRequest]:
    """Admit every call. Where one is refused, none stays admitted."""
    opened: list[OpenRequest] = []

    async def open_one(call: ChatCall, run_id: str) -> OpenRequest:
        opened.append(one := await service.open(call, key, request_id, run_id))
        return one

    try:
        return await all_of([open_one(call, run_id) for call, run_id in zip(calls, ids, strict=True)])
    except BaseException:
        for one in opened:
            one.close()
        raise
