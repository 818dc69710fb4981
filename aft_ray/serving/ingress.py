"""The front door: an OpenAI-compatible FastAPI app over one or two pools of engine replicas.

Serve cannot hand a streaming response from one deployment to another, so the algorithm runs here, over
`HandleEngine`s, and the last layer's tokens go out as they are made. A client that goes away cancels its run, and
with it every request in the engines. Prompts and answers are never logged.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from aft_ray.config import ServingConfig
from aft_ray.engines.base import EngineInfo, GenerateRequest, Sample, Sampling
from aft_ray.errors import DeadlineExceeded, EngineError
from aft_ray.inference import Role, propose_and_aggregate
from aft_ray.inference.events import AnswerDelta, Event, Finished
from aft_ray.records import Message, prompt_id_of
from aft_ray.serving.admin import admin_routes, keep_watching
from aft_ray.serving.admission import Ticket, cost_of
from aft_ray.serving.body_limit import limited
from aft_ray.serving.caller import Caller, caller_of
from aft_ray.serving.gate import ActorAsk, Gate
from aft_ray.serving.handle_engine import HandleEngine
from aft_ray.serving.http_errors import HttpError, as_http_error, code_of
from aft_ray.serving.keys import KeyRing, refuse_open_server
from aft_ray.serving.ledger import Bill, OpenRequest, RequestLedger
from aft_ray.serving.metrics import METRICS, count_layer
from aft_ray.serving.openai_request import (
    LONGEST_REQUEST_S,
    Call,
    ChatBody,
    CompletionBody,
    call_of,
    check_engine,
    default_model,
    model_names,
    plan_limits,
    plan_name,
)
from aft_ray.serving.openai_response import DONE, KEEP_ALIVE, Drafts, Reply, data_line
from aft_ray.serving.openai_schema import ERRORS, ChatCompletion, Model, ModelList, Status, TextCompletion, answers
from aft_ray.serving.page import page_routes
from aft_ray.serving.request_id import request_id_of, tell_request_id
from aft_ray.templates import AggregatorTemplate, ChatFormat, InContextPrompt, MessagesFormat, PromptFormat

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve.aft_ray")

KEEP_ALIVE_S = 2.0
"""A stream is never silent for longer: proxies in between close quiet connections."""
READY_S = 5.0
"""Time an engine has for the one-token probe of `/ready`."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything a request needs."""

    config: ServingConfig
    proposers: tuple[Role, ...]
    aggregator: Role
    """With topology `shared` also the only proposer. A request's model chooses the adapter."""
    template: AggregatorTemplate
    keys: KeyRing
    gate: Gate
    ledger: RequestLedger

    @property
    def settings(self) -> ServingConfig:
        """The config with the adapters that are served now."""
        adapters = {name: adapter.path for name, adapter in self.gate.table.adapters.items()}
        return self.config.model_copy(update={"adapters": adapters})

    async def open(self, call: Call, key: Caller, request_id: str, reply_id: str) -> OpenRequest:
        """Let a call in, or HttpError. Whoever gets an open request closes it."""
        names = (self._adapter_name(call), self._proposer_adapter_name(call))
        cost = cost_of(call.plan, self.aggregator.format.count(call.messages), call.final.num_answers)
        ticket = Ticket(id=reply_id, key=key.name, num_tokens=cost)
        try:
            async with asyncio.timeout(call.plan.deadline_s):
                ticket = await self.gate.enter(ticket, key.limits, names)
        except TimeoutError:
            raise DeadlineExceeded(f"deadline_s {call.plan.deadline_s} passed before the request could begin") from None
        bill = Bill(
            request_id=request_id,
            id=reply_id,
            key=key.name,
            model=call.name,
            plan=plan_name(call.plan),
            adapter=ticket.adapters[0],
            watch=count_layer,
        )
        return OpenRequest(self.gate, self.ledger, ticket, bill)

    def _adapter_name(self, call: Call) -> str | None:
        return None if call.name == self.config.base_name else call.name

    def _proposer_adapter_name(self, call: Call) -> str | None:
        config = self.config
        if config.proposer_adapter is not None:
            return config.proposer_adapter
        return self._adapter_name(call) if proposers_take_adapters(config) else None

    @property
    def single_proposer(self) -> Role:
        """Who writes a single sample."""
        return max(self.proposers, key=lambda role: role.share)

    def last_engine(self, call: Call) -> EngineInfo:
        """The engine that writes what the client gets."""
        return (self.aggregator if call.plan.num_layers else self.single_proposer).engine.info

    def run(self, call: Call, run_id: str, opened: OpenRequest) -> AsyncGenerator[Event, None]:
        """The events of one call, counted."""
        return METRICS.watch(self._events(call, run_id, opened), call)

    def _events(self, call: Call, run_id: str, opened: OpenRequest) -> AsyncGenerator[Event, None]:
        adapter, proposer_adapter = opened.ticket.adapters
        return propose_and_aggregate(
            prompt_id=prompt_id_of(call.messages),
            messages=call.messages,
            plan=call.plan,
            proposer=[dataclasses.replace(role, adapter=proposer_adapter) for role in self.proposers],
            aggregator=dataclasses.replace(self.aggregator, adapter=adapter),
            template=self.template,
            run_seed=call.run_seed,
            request_id=run_id,
            account=opened.bill.add,
            final=call.final,
        )

    async def probe(self) -> None:
        """One token from every pool, or TimeoutError or EngineError."""
        async with asyncio.timeout(READY_S):
            await asyncio.gather(
                *(probe(role) for role in {id(r): r for r in (*self.proposers, self.aggregator)}.values())
            )

    async def try_adapter(self, path: str) -> None:
        """One token with an adapter from every pool that will use it, or EngineError."""
        roles = [self.aggregator]
        if self.config.topology == "split" and proposers_take_adapters(self.config):
            roles += self.proposers
        await asyncio.gather(*(probe(dataclasses.replace(role, adapter=path)) for role in roles))


def proposers_take_adapters(config: ServingConfig) -> bool:
    """An adapter fits one base model: proposers on other models draft without it."""
    has_own_model = config.proposer_engine is not None or bool(config.proposers)
    return config.topology == "shared" or not has_own_model


async def probe(role: Role) -> None:
    """The engine of a role writes one token."""
    messages: tuple[Message, ...] = ({"role": "user", "content": "Say yes."},)
    request = GenerateRequest(
        request_id=f"ready-{uuid.uuid4().hex}",
        prompt_ids=tuple(role.format.prompt_ids(messages)),
        messages=messages,
        sampling=Sampling(temperature=0, max_tokens=1),
        seeds=(0,),
        adapter=role.adapter,
    )
    async with aclosing(role.engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, Sample) and event.error is not None:
                raise EngineError(event.error)


async def watched(events: AsyncGenerator[Event, None], interval_s: float) -> AsyncGenerator[Event | None, None]:
    """The events, and None whenever `interval_s` went by without one. Raises what they raise.

    One task reads them from beginning to end, so timeouts inside the run keep their task; closing this generator
    cancels that task and waits until the run has let go of its engines.
    """
    inbox: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
    reader = asyncio.create_task(_read(events, inbox))
    try:
        while True:
            try:
                async with asyncio.timeout(interval_s):
                    item = await inbox.get()
            except TimeoutError:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(events: AsyncGenerator[Event, None], inbox: asyncio.Queue[Event | Exception | None]) -> None:
    clock = asyncio.timeout(LONGEST_REQUEST_S)
    try:
        async with clock, aclosing(events):
            async for event in events:
                inbox.put_nowait(event)
        inbox.put_nowait(None)
    except Exception as error:  # carried to the reader of the inbox, who raises it
        late = DeadlineExceeded(f"the request took longer than {LONGEST_REQUEST_S:g} s")
        inbox.put_nowait(late if clock.expired() else error)


async def whole_reply(service: Service, reply: Reply, opened: OpenRequest) -> dict[str, Any]:
    """The reply in one piece."""
    drafts = Drafts()
    try:
        async with aclosing(watched(service.run(reply.call, reply.run_id, opened), KEEP_ALIVE_S)) as events:
            async for event in events:
                if event is not None:
                    drafts.watch(event)
                if isinstance(event, Finished):
                    opened.bill.status = "answered"
                    return reply.whole(event, drafts)
    except Exception as error:
        opened.bill.failed(code_of(error))
        raise
    finally:
        opened.close()
    raise AssertionError("a run ended without an answer and without an error")


async def streamed_reply(
    service: Service, reply: Reply, opened: OpenRequest, request_id: str
) -> AsyncGenerator[str, None]:
    """The reply as server-sent events. Whatever happens, the last one is `[DONE]`."""
    drafts = Drafts()
    yield data_line(reply.opening())
    try:
        async with aclosing(watched(service.run(reply.call, reply.run_id, opened), KEEP_ALIVE_S)) as events:
            async for event in events:
                match event:
                    case None:
                        yield KEEP_ALIVE
                    case AnswerDelta():
                        yield data_line(reply.piece(event))
                    case Finished():
                        opened.bill.status = "answered"
                        drafts.watch(event)
                        for chunk in reply.closing(event, drafts):
                            yield data_line(chunk)
                    case _:
                        drafts.watch(event)
                        if reply.call.progress:
                            yield reply.progress(event, drafts)
    except Exception as error:  # process boundary: the status line is gone, so the error travels in the stream
        opened.bill.failed(code_of(error))
        yield data_line(as_http_error(error, request_id).body)
    yield DONE


class EventStream(StreamingResponse):
    """Server-sent events; a client that goes away closes the generator at once, wherever it stands."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[str, None], opened: OpenRequest) -> None:
        super().__init__(content)
        self._opened = opened

    async def stream_response(self, send: Send) -> None:
        assert isinstance(self.body_iterator, AsyncGenerator)
        async with aclosing(self.body_iterator):
            await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also when the client left before the first byte, and the body was never begun
            self._opened.close()


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


def make_api(service: Service) -> FastAPI:
    """The app. Knows nothing of Serve: any ASGI server can run it over any engines."""
    api = FastAPI(title="aft_ray", docs_url=None, redoc_url=None)  # those pages load outside scripts

    async def page_error(request: Request, error: Exception) -> Response:
        response = error_response(as_http_error(error, request_id_of(request)))
        response.headers.update(getattr(error, "headers", None) or {})  # a 405 owes the methods allowed
        return tell_request_id(request, response)

    api.state.max_body_bytes = service.config.max_body_bytes
    if service.config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    api.add_exception_handler(HTTPException, page_error)
    api.include_router(page_routes())
    api.include_router(open_routes(service))
    api.include_router(model_routes(service))
    api.include_router(admin_routes(service))
    return api


def open_routes(service: Service) -> APIRouter:
    """What a load balancer asks: no key needed."""
    router = APIRouter(route_class=OpenAIRoute)

    @router.get("/health", responses={200: {"model": Status}})
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @router.get("/ready", responses={200: {"model": Status}, 503: {"model": Status}})
    async def ready(request: Request) -> JSONResponse:
        """Every engine pool answers a one-token probe in time, and requests are let in."""
        if service.gate.table.draining:
            return JSONResponse({"status": "draining"}, 503)
        try:
            await service.probe()
        except Exception as error:  # process boundary: not ready, whatever the reason; the log has its class
            logger.warning("not ready: %s", type(error).__name__)
            return JSONResponse({"status": "engines do not answer"}, 503)
        return JSONResponse({"status": "ready"})

    return router


def model_routes(service: Service) -> APIRouter:
    """The OpenAI API."""

    def caller(request: Request) -> Caller:
        return caller_of(request.headers.get("authorization"), service)

    router = APIRouter(prefix="/v1", route_class=OpenAIRoute, dependencies=[Depends(caller)])
    started = int(time.time())

    def model_object(name: str) -> dict[str, Any]:
        aliases = [f"{name}@k<proposals>-l<layers>", f"{name}@single"]
        aft = plan_limits(service.config) | {"default": name == default_model(service.settings)}
        return {
            "id": name, "object": "model", "created": started, "owned_by": "aft_ray", "aliases": aliases, "aft": aft,
        }  # fmt: skip

    async def answer(kind: Literal["chat", "text"], body: ChatBody | CompletionBody, request: Request) -> Response:
        call = call_of(body, service.settings)
        check_engine(call, service.last_engine(call))
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        reply = Reply(
            kind=kind,
            call=call,
            id=f"{prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            request_id=request_id_of(request),
        )
        opened = await service.open(call, caller(request), request_id_of(request), reply.id)
        if call.stream:
            return EventStream(streamed_reply(service, reply, opened, request_id_of(request)), opened)
        return JSONResponse(await whole_reply(service, reply, opened))

    @router.get("/models", responses={200: {"model": ModelList}, **ERRORS})
    async def models() -> dict[str, Any]:
        """The base model and the adapters, each with the aliases that choose a plan."""
        return {"object": "list", "data": [model_object(name) for name in model_names(service.settings)]}

    @router.get("/models/{name:path}", responses={200: {"model": Model}, **ERRORS})
    async def model(name: str) -> dict[str, Any]:
        if name not in model_names(service.settings):
            names = ", ".join(model_names(service.settings))
            raise HttpError(404, f"no such model; models: {names}", param="model", code="model_not_found")
        return model_object(name)

    @router.post("/chat/completions", response_model=None, responses=answers(ChatCompletion))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer("chat", body, request)

    @router.post("/completions", response_model=None, responses=answers(TextCompletion))
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer("text", body, request)

    return router


class Ingress:
    """Serve deployment class. Serve asks it for its app once, when the replica starts."""

    def __init__(
        self,
        config: ServingConfig,
        key_digests: Sequence[str],
        aggregator: DeploymentHandle,
        *proposers: DeploymentHandle,
    ) -> None:
        self.config = config
        self.keys = KeyRing(key_digests, config.keys_file)
        self.tasks: list[asyncio.Task[None]] = []
        self.aggregator = aggregator
        self.proposers = proposers

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Connects to the engine pools (and so waits for them), then builds the app."""
        refuse_open_server(await asyncio.to_thread(bound_host), self.keys.is_asked_for)
        in_context = InContextPrompt.load(self.config.templates.in_context)
        aggregator = await role_over(self.aggregator, in_context)
        service = Service(
            config=self.config,
            aggregator=aggregator,
            proposers=await self._proposer_roles(in_context) or (aggregator,),
            template=AggregatorTemplate.load(self.config.templates.aggregator),
            keys=self.keys,
            gate=Gate(ActorAsk(), self.config),
            ledger=RequestLedger(self.config.ledger),
        )
        await service.gate.renew()
        self.service = service
        self.tasks = [asyncio.create_task(service.gate.keep_renewing()), asyncio.create_task(keep_watching(service))]
        return make_api(service)

    async def _proposer_roles(self, in_context: InContextPrompt) -> tuple[Role, ...]:
        roles = [await role_over(handle, in_context) for handle in self.proposers]
        shares = [pool.share for pool in self.config.proposers] or [1.0] * len(roles)
        return tuple(dataclasses.replace(role, share=share) for role, share in zip(roles, shares, strict=True))

    async def drain(self) -> None:
        """Let no request in any more, at any ingress replica."""
        await self.service.gate.change(drain=True)

    async def status(self) -> dict[str, int]:
        """What this replica is doing now: for whoever looks for leaks."""
        return {"process_id": os.getpid(), "num_tasks": len(asyncio.all_tasks())}

    async def num_open(self) -> int:
        """Requests under way at all ingress replicas."""
        status = await self.service.gate.ask("status")
        return int(status["num_requests"])


async def role_over(handle: DeploymentHandle, in_context: InContextPrompt) -> Role:
    """The engines behind a handle, with the prompt format of their model (in context where it has no chat template)."""
    engine = await HandleEngine.connect(handle)
    prompt_format: PromptFormat = MessagesFormat()
    if not engine.info.takes_messages:
        assert engine.info.tokenizer is not None, "an engine that takes ids names its tokenizer"
        prompt_format = await asyncio.to_thread(ChatFormat.load, engine.info.tokenizer, in_context)
    return Role(engine=engine, format=prompt_format)


def bound_host() -> str:
    """Where Serve listens, whatever a config says: `serve deploy` binds to 0.0.0.0 unless its YAML names a host."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None, "a replica has a Serve controller"
    return client.http_config.host or "127.0.0.1"  # None: no HTTP server
