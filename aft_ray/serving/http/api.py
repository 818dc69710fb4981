"""The FastAPI app over a `Service`: the OpenAI API, health checks, the page and the admin routes."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response, Security
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from aft_ray.serving.http.admin import admin_routes
from aft_ray.serving.http.answering import IGNORED, calls_of_prompts, reply_to, resolved
from aft_ray.serving.http.page import page_routes
from aft_ray.serving.http.route import OpenAIRoute, unrouted_error
from aft_ray.serving.limits.admission import Room
from aft_ray.serving.limits.keys import Caller
from aft_ray.serving.openai.body import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from aft_ray.serving.openai.request import check_ids, default_model, model_names, plan_limits, split_alias
from aft_ray.serving.openai.response import ChatReply, TextReply
from aft_ray.serving.openai.responses_api import ResponsesReply, chat_body_of
from aft_ray.serving.openai.schema import (
    ERRORS,
    AftModel,
    ChatCompletion,
    Model,
    ModelList,
    ResponseObject,
    Status,
    Text,
    TextCompletion,
    Tokens,
    answers,
)
from aft_ray.serving.service import Service

logger = logging.getLogger("ray.serve.aft_ray")


def make_api(service: Service) -> FastAPI:
    """Return the app. It does not depend on Serve: any ASGI server can run it over any engines."""
    api = FastAPI(
        title="aft_ray", docs_url=None, redoc_url=None, redirect_slashes=False
    )  # the docs pages load scripts from other sites

    api.state.max_body_bytes = service.config.max_body_bytes
    if service.config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients add headers of their own, such as x-stainless-os
            expose_headers=["x-request-id", "retry-after", IGNORED, *Room.HEADERS],
        )
    api.add_exception_handler(HTTPException, unrouted_error)
    api.include_router(page_routes())
    api.include_router(open_routes(service))
    api.include_router(model_routes(service))
    api.include_router(answer_routes(service))
    api.include_router(token_routes(service))
    api.include_router(admin_routes(service))
    return api


def open_routes(service: Service) -> APIRouter:
    """Return the routes for load balancers, which need no key."""
    router = APIRouter(route_class=OpenAIRoute)

    @router.get("/health")
    async def health() -> Status:
        """Answer 200 as long as the process is alive."""
        return Status(status="ok")

    @router.get("/ready", responses={503: {"model": Status}})
    async def ready(response: Response) -> Status:
        """Answer 200 if every engine pool writes a token in time and the server accepts requests, else 503."""
        if service.gate.table.draining:
            response.status_code = 503
            return Status(status="draining")
        try:
            await service.readiness.check()
        except Exception as error:  # process boundary: not ready, whatever the reason; the class is logged
            logger.warning("not ready: %s", type(error).__name__)
            response.status_code = 503
            return Status(status="engines do not answer")
        return Status(status="ready")

    return router


def key_given(service: Service) -> tuple[Any, list[Any]]:
    """Return the dependency that gives a route its caller, and all that a router with keys depends on."""

    # a coroutine, because FastAPI would run a plain function in a thread, which costs two milliseconds
    async def caller(request: Request) -> Caller:
        return service.caller(request.headers.get("authorization"))

    caller_given = Depends(caller)
    dependencies = [caller_given]
    if service.keys.is_required:  # for the OpenAPI document only; `caller` checks the key
        dependencies.append(Security(HTTPBearer(auto_error=False)))
    return caller_given, dependencies


def token_routes(service: Service) -> APIRouter:
    """Return the routes between text and ids, where vLLM has them."""
    router = APIRouter(route_class=OpenAIRoute, dependencies=key_given(service)[1])

    @router.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeBody) -> Tokens:
        """Return the ids of a text as it is, or of a conversation with its generation prompt."""
        ids = await service.answers.tokens_of(body.text())
        window = service.answers.info.aggregator.max_model_len
        return Tokens(count=len(ids), max_model_len=window, tokens=list(ids))

    @router.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeBody) -> Text:
        """Return the text of ids, control tokens included."""
        check_ids(body.tokens, service.answers.info.aggregator_vocabulary, "tokens")
        return Text(prompt=await service.answers.text_of(body.tokens))

    return router


def model_routes(service: Service) -> APIRouter:
    """Return the routes that list the models."""
    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, dependencies=key_given(service)[1])
    started = int(time.time())

    def model_named(name: str) -> Model:
        aliases = [f"{name}@k<proposals>-l<layers>", f"{name}@single"]
        is_default = name == default_model(service.current_config)
        aft = AftModel(**plan_limits(service.config), default=is_default)
        return Model(id=name, object="model", created=started, owned_by="aft_ray", aliases=aliases, aft=aft)

    @router.get("/models", responses=ERRORS)
    async def models() -> ModelList:
        """List the base model and the adapters, each with the aliases that choose a plan."""
        names = model_names(service.current_config)
        listed = [f"{name}@{plan}" for name in names for plan in service.config.listed_plans]
        return ModelList(object="list", data=[*map(model_named, names), *map(model_named, listed)])

    @router.get("/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> Model:
        split_alias(name, service.current_config)  # raises the 404
        return model_named(name)

    return router


def answer_routes(service: Service) -> APIRouter:
    """Return the routes that models answer."""
    caller_given, dependencies = key_given(service)
    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, dependencies=dependencies)

    @router.post("/chat/completions", response_model=None, responses=answers(ChatCompletion))
    async def chat_completions(body: ChatBody, request: Request, key: Caller = caller_given) -> Response:
        calls = [await resolved(service, body)]
        return await reply_to(service, calls, ChatReply, "chatcmpl-", request, key)

    @router.post("/completions", response_model=None, responses=answers(TextCompletion))
    async def completions(body: CompletionBody, request: Request, key: Caller = caller_given) -> Response:
        calls = await calls_of_prompts(service, body)
        make = partial(TextReply, answer_is_shown=body.max_tokens != 0)
        return await reply_to(service, calls, make, "cmpl-", request, key)

    @router.post("/responses", response_model=None, responses=answers(ResponseObject))
    async def responses(
        body: Annotated[dict[str, Any], Body()], request: Request, key: Caller = caller_given
    ) -> Response:
        calls = [await resolved(service, chat_body_of(body))]
        return await reply_to(service, calls, partial(ResponsesReply, asked=body), "resp_", request, key)

    return router
