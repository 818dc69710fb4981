"""What every request needs, and the path of one call: admitted, billed, and answered over the engine pools."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from aft_ray.config import ServingConfig
from aft_ray.engines.base import EngineInfo, GenerateRequest, Sample, Sampling
from aft_ray.errors import DeadlineExceeded, EngineError
from aft_ray.inference import Role, propose_and_aggregate
from aft_ray.inference.events import Event
from aft_ray.inference.off_loop import num_characters, off_loop
from aft_ray.records import Message, prompt_id_of
from aft_ray.serving.admission import Ticket, cost_of
from aft_ray.serving.gate import Gate
from aft_ray.serving.keys import Caller, KeyRing
from aft_ray.serving.ledger import Bill, OpenRequest, RequestLedger
from aft_ray.serving.metrics import METRICS, count_layer
from aft_ray.serving.openai_request import ChatCall, plan_name
from aft_ray.templates import AggregatorTemplate

READY_S = 5.0
"""How long an engine may take for the one-token probe of `/ready`."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything that a request needs."""

    config: ServingConfig
    proposers: tuple[Role, ...]
    aggregator: Role
    """With topology `shared` it is also the only proposer. The request's model selects the adapter."""
    template: AggregatorTemplate
    keys: KeyRing
    gate: Gate
    ledger: RequestLedger

    def caller(self, authorization: str | None) -> Caller:
        """Return the sender of a request from its `Authorization` header, or raise HttpError 401."""
        return self.keys.caller(authorization, self.config.admission.per_key)

    @property
    def current_config(self) -> ServingConfig:
        """The config, with the adapters that are served now."""
        adapters = {name: adapter.path for name, adapter in self.gate.table.adapters.items()}
        return self.config.model_copy(update={"adapters": adapters})

    async def open(self, call: ChatCall, key: Caller, request_id: str, reply_id: str) -> OpenRequest:
        """Admit a call, or raise HttpError. The caller must close the open request that this returns."""
        names = (self._adapter_name(call), self._proposer_adapter_name(call))
        num_tokens = await off_loop(num_characters(call.messages), self.aggregator.format.count, call.messages)
        cost = cost_of(call.plan, num_tokens, call.final.num_choices)
        ticket = Ticket(id=reply_id, key=key.name, num_tokens=cost)
        try:
            async with asyncio.timeout(call.plan.deadline_s):
                ticket = await self.gate.enter(ticket, key.limits, names)
        except TimeoutError:
            raise DeadlineExceeded(
                f"deadline_s {call.plan.deadline_s} passed before the request was admitted"
            ) from None
        bill = Bill(
            request_id=request_id,
            id=reply_id,
            key=key.name,
            model=call.name,
            plan=plan_name(call.plan),
            adapter=ticket.adapters[0],
            on_usage=count_layer,
        )
        return OpenRequest(self.gate, self.ledger, ticket, bill)

    def _adapter_name(self, call: ChatCall) -> str | None:
        return None if call.name == self.config.base_name else call.name

    def _proposer_adapter_name(self, call: ChatCall) -> str | None:
        config = self.config
        if config.proposer_adapter is not None:
            return config.proposer_adapter
        return self._adapter_name(call) if config.proposers_take_adapters else None

    @property
    def single_proposer(self) -> Role:
        """The proposer that writes a single sample (L=0): the one with the largest share."""
        return max(self.proposers, key=lambda role: role.share)

    def last_engine(self, call: ChatCall) -> EngineInfo:
        """Return the engine that writes the final answer of a call."""
        return (self.aggregator if call.plan.num_layers else self.single_proposer).engine.info

    def run(self, call: ChatCall, run_id: str, opened: OpenRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of a call, and record its metrics."""
        return METRICS.timed(self._events(call, run_id, opened), call)

    def _events(self, call: ChatCall, run_id: str, opened: OpenRequest) -> AsyncGenerator[Event, None]:
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
            on_usage=opened.bill.add,
            final=call.final,
        )

    async def probe(self) -> None:
        """Get one token from every pool. Raises TimeoutError or EngineError."""
        async with asyncio.timeout(READY_S):
            await asyncio.gather(
                *(probe(role) for role in {id(r): r for r in (*self.proposers, self.aggregator)}.values())
            )

    async def try_adapter(self, path: str) -> None:
        """Get one token with an adapter from every pool that will use it. Raises EngineError."""
        roles = [self.aggregator]
        if self.config.topology == "split" and self.config.proposers_take_adapters:
            roles += self.proposers
        await asyncio.gather(*(probe(dataclasses.replace(role, adapter=path)) for role in roles))


async def probe(role: Role) -> None:
    """Get one token from the engine of a role. Raises EngineError."""
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
