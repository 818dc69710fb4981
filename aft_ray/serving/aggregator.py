"""Runs the plan of a request over engines: its own, and those of the proposers.

Templates, token ids and the count of tokens are known here and not in the ingress.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from aft_ray.engines.base import EngineInfo, GenerateRequest, Sample, Sampling
from aft_ray.errors import EngineError, InputError
from aft_ray.inference import Role, propose_and_aggregate
from aft_ray.inference.events import Event, LayerUsage
from aft_ray.inference.off_loop import num_characters, off_loop
from aft_ray.records import Message, prompt_id_of
from aft_ray.serving.run_request import PoolInfo, RunRequest
from aft_ray.templates import AggregatorTemplate


@dataclass(frozen=True, kw_only=True)
class Aggregator:
    """Runs plans over engines. It knows nothing of Ray, so it also runs over engines of its own process."""

    proposers: tuple[Role, ...]
    aggregator: Role
    """With topology `shared` it is also the only proposer. A request selects the adapter."""
    template: AggregatorTemplate
    proposers_take_adapters: bool = True

    @property
    def info(self) -> PoolInfo:
        single = max(self.proposers, key=lambda role: role.share)
        return PoolInfo(
            aggregator=_info_of(self.aggregator),
            single=_info_of(single),
            honours=self.aggregator.engine.info.honours.intersection(
                *(role.engine.info.honours for role in self.proposers)
            ),
            template_arguments=frozenset().union(
                *(role.format.template_arguments for role in (*self.proposers, self.aggregator))
            ),
            aggregator_vocabulary=self.aggregator.format.vocabulary_size,
            single_vocabulary=single.format.vocabulary_size,
            proposer_vocabulary=min(
                (size for role in self.proposers if (size := role.format.vocabulary_size) is not None), default=None
            ),
        )

    def run(self, request: RunRequest, on_usage: Callable[[LayerUsage], None]) -> AsyncGenerator[Event, None]:
        return propose_and_aggregate(
            prompt_id=prompt_id_of(request.messages),
            messages=request.messages,
            plan=request.plan,
            proposer=[dataclasses.replace(role, adapter=request.proposer_adapter) for role in self.proposers],
            aggregator=dataclasses.replace(self.aggregator, adapter=request.adapter),
            template=self.template,
            run_seed=request.run_seed,
            request_id=request.run_id,
            on_usage=on_usage,
            final=request.final,
            cache_salt=request.cache_salt,
            template_arguments=request.template_arguments,
        )

    async def tokens_of(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        chat = self.aggregator.format
        if self.aggregator.engine.info.takes_messages:
            raise InputError("this server's model takes messages: its tokenizer is not known")
        if isinstance(text, str):
            return await off_loop(len(text), chat.text_ids, text)
        return await off_loop(num_characters(text), chat.prompt_ids, text)

    async def text_of(self, ids: Sequence[int]) -> str:
        try:
            return await off_loop(len(ids), self.aggregator.format.decode, ids)
        except (IndexError, OverflowError, TypeError) as error:
            raise InputError(f"not all of these are ids of this model's tokens: {error}") from error

    async def probe(self, adapter: str | None = None) -> None:
        roles = {id(self.aggregator): dataclasses.replace(self.aggregator, adapter=adapter)}
        for role in self.proposers:
            own = adapter if self.proposers_take_adapters else None
            roles.setdefault(id(role), dataclasses.replace(role, adapter=own))
        await asyncio.gather(*map(probe, roles.values()))


def _info_of(role: Role) -> EngineInfo:
    """Return the engine's description. It calls tools only where the role's prompts have a place for them."""
    info = role.engine.info
    return dataclasses.replace(info, calls_tools=info.calls_tools and role.format.takes_tools)


async def probe(role: Role) -> None:
    """Get one token from the engine of a role. Raises EngineError."""
    messages: tuple[Message, ...] = ({"role": "user", "content": "Say yes."},)
    request = GenerateRequest(
        request_id=f"ready-{uuid.uuid4().hex}",
        prompt_ids=tuple(role.format.prompt_ids(messages)),
        messages=messages,
        sampling=Sampling(temperature=0, max_tokens=1),
        seeds=(0,),
        stop_ids=role.format.stop_ids,
        adapter=role.adapter,
    )
    async with aclosing(role.engine.generate(request)) as events:
        async for event in events:
            if isinstance(event, Sample) and event.error is not None:
                raise EngineError(event.error)
