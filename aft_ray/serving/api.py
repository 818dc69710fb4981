"""The FastAPI app over a `Service`: the OpenAI API, health checks, the page and the admin routes."""

from __future__ import annotations

import logging
import time
import uuid
from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request, Response, Security
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from aft_ray.serving.admin import admin_routes
from aft_ray.serving.http import OpenAIRoute, request_id_of, unrouted_error
from aft_ray.serving.http_errors import HttpError
from aft_ray.serving.keys import Caller
from aft_ray.serving.openai_body import ChatBody, CompletionBody
from aft_ray.serving.openai_request import (
    call_of,
    check_engine,
    default_model,
    model_names,
    plan_limits,
)
from aft_ray.serving.openai_response import Reply
from aft_ray.serving.openai_schema import ERRORS, ChatCompletion, Model, ModelList, Status, TextCompletion, answers
from aft_ray.serving.page import page_routes
from aft_ray.serving.replies import EventStream, streamed_reply, whole_reply
from aft_ray.serving.service import Service

logger = logging.getLogger("ray.serve.aft_ray")


def make_api(service: Service) -> FastAPI:
    """Return the app. It does not depend on Serve: any ASGI server can run it over any engines."""
    api = FastAPI(title="aft_ray", docs_url=None, redoc_url=None)  # the docs pages load scripts from other sites

    api.state.max_body_bytes = service.config.max_body_bytes
    if service.config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    api.add_exception_handler(HTTPException, unrouted_error)
    api.include_router(page_routes())
    api.include_router(open_routes(service))
    api.include_router(model_routes(service))
    api.include_router(admin_routes(service))
    return api


def open_routes(service: Service) -> APIRouter:
    """Return the routes for load balancers, which need no key."""
    router = APIRouter(route_class=OpenAIRoute)

    @router.get("/health", responses={200: {"model": Status}})
    async def health() -> dict[str, str]:
        """Answer 200 as long as the process is alive."""
        return {"status": "ok"}

    @router.get("/ready", responses={200: {"model": Status}, 503: {"model": Status}})
    async def ready(request: Request) -> JSONResponse:
        """Answer 200 if every engine pool writes a token in time and the server accepts requests, else 503."""
        if service.gate.table.draining:
            return JSONResponse({"status": "draining"}, 503)
        try:
            await service.probe()
        except Exception as error:  # process boundary: not ready, whatever the reason; the class is logged
            logger.warning("not ready: %s", type(error).__name__)
            return JSONResponse({"status": "engines do not answer"}, 503)
        return JSONResponse({"status": "ready"})

    return router


def model_routes(service: Service) -> APIRouter:
    """Return the routes of the OpenAI API."""

    # a coroutine, because FastAPI would run a plain function in a thread, which costs two milliseconds
    async def caller(request: Request) -> Caller:
        return service.caller(request.headers.get("authorization"))

    caller_given = Depends(caller)
    dependencies = [caller_given]
    if service.keys.is_required:  # for the OpenAPI document only; `caller` checks the key
        dependencies.append(Security(HTTPBearer(auto_error=False)))
    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, dependencies=dependencies)
    started = int(time.time())

    def model_object(name: str) -> dict[str, Any]:
        aliases = [f"{name}@k<proposals>-l<layers>", f"{name}@single"]
        aft = plan_limits(service.config) | {"default": name == default_model(service.current_config)}
        return {
            "id": name, "object": "model", "created": started, "owned_by": "aft_ray", "aliases": aliases, "aft": aft,
        }  # fmt: skip

    async def answer(
        kind: Literal["chat", "text"], body: ChatBody | CompletionBody, request: Request, key: Caller
    ) -> Response:
        try:
            call = call_of(body, service.current_config)
        except HttpError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            await service.gate.renew()  # another ingress replica may have received this name a moment ago
            call = call_of(body, service.current_config)
        check_engine(call, service.last_engine(call))
        reply_id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        request_id = request_id_of(request)
        reply = Reply(kind=kind, call=call, id=reply_id, created=int(time.time()), request_id=request_id)
        opened = await service.open(call, key, request_id, reply_id)
        if call.stream:
            return EventStream(streamed_reply(service, reply, opened), opened)
        return JSONResponse(await whole_reply(service, reply, opened))

    @router.get("/models", responses={200: {"model": ModelList}, **ERRORS})
    async def models() -> dict[str, Any]:
        """List the base model and the adapters, each with the aliases that choose a plan."""
        return {"object": "list", "data": [model_object(name) for name in model_names(service.current_config)]}

    @router.get("/models/{name:path}", responses={200: {"model": Model}, **ERRORS})
    async def model(name: str) -> dict[str, Any]:
        if name not in model_names(service.current_config):
            names = ", ".join(model_names(service.current_config))
            raise HttpError(404, f"no such model; this server has: {names}", param="model", code="model_not_found")
        return model_object(name)

    @router.post("/chat/completions", response_model=None, responses=answers(ChatCompletion))
    async def chat_completions(body: ChatBody, request: Request, key: Caller = caller_given) -> Response:
        return await answer("chat", body, request, key)

    @router.post("/completions", response_model=None, responses=answers(TextCompletion))
    async def completions(body: CompletionBody, request: Request, key: Caller = caller_given) -> Response:
        return await answer("text", body, request, key)

    return router
