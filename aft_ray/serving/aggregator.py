"""The deployment that answers: a replica runs the whole plan of a request, next to its own engine.

    Ingress --one streamed call--> Aggregator replica --streamed calls--> Proposer replicas

With topology `shared` its own engine writes the drafts too, and nothing leaves the process before the final answer.
With `split` drafts come from the proposer pools that it holds handles to; hidden layers and the final layer are
written here. Templates, token ids and the count of tokens are known here and not in the ingress.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aft_ray.config import EngineConfig, TracesConfig
from aft_ray.engines.base import EngineInfo, GenerateRequest, Sample, Sampling, SpanParent
from aft_ray.errors import AftError, EngineError, InputError
from aft_ray.inference import Role, propose_and_aggregate
from aft_ray.inference.events import AnswerDelta, Event, Finished, LayerUsage
from aft_ray.inference.off_loop import num_characters, off_loop
from aft_ray.inference.plan import FinalLayer, Plan
from aft_ray.records import Message, prompt_id_of
from aft_ray.serving.replica import Bills, EngineReplica
from aft_ray.serving.replica_calls import Routed, by_own_transport
from aft_ray.templates import AggregatorTemplate
from aft_ray.templates.loading import load_format

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """One request as it goes from the ingress to an aggregator replica."""

    run_id: str
    """Name of the run in every engine; no other run has it."""
    messages: tuple[Message, ...]
    plan: Plan
    final: FinalLayer
    template_arguments: Mapping[str, Any]
    """What the chat templates are told besides the messages."""
    run_seed: int
    adapter: str | None
    proposer_adapter: str | None
    cache_salt: str | None
    """Name of the key that asks: what others asked cannot be told from how fast a prompt is read."""
    shows_drafts: bool
    """Whether the client sees drafts and layers, which are not sent otherwise."""
    trace: SpanParent | None = None
    """Set where the request is traced."""

    @property
    def is_watched(self) -> bool:
        """Whether somebody reads the events before the last one is there."""
        return self.shows_drafts or self.final.is_read


@dataclass(frozen=True, kw_only=True)
class RunFailed:
    """The last event of a run that ended with an error of ours, and what it had cost."""

    error: AftError
    usage: tuple[LayerUsage, ...]


@dataclass(frozen=True, kw_only=True)
class PoolInfo:
    """What the ingress must know of the engines before the first request."""

    aggregator: EngineInfo
    """Engine of the aggregations, the final answer included."""
    single: EngineInfo
    """Engine that answers alone (L=0)."""
    honours: frozenset[str] = frozenset()
    """Those settings of `Sampling` beyond the usual that all engines honour."""
    template_arguments: frozenset[str] = frozenset()
    """Names of what at least one chat template can be told besides messages and tools."""
    aggregator_vocabulary: int | None = None
    """Number of token ids of the model that aggregates; None where its tokenizer is not known."""
    single_vocabulary: int | None = None
    """The same of the model that answers alone."""
    proposer_vocabulary: int | None = None
    """The smallest among the models that write drafts."""


class Answers(Protocol):
    """What the ingress asks: aggregator replicas behind Serve, or one aggregator in its own process."""

    @property
    def info(self) -> PoolInfo: ...

    def run(self, request: RunRequest, on_usage: Callable[[LayerUsage], None]) -> AsyncGenerator[Event, None]:
        """Yield the events of a run.

        `on_usage` is called with the usage of every layer before the generator ends, or is closed, however that
        happens. Raises what `propose_and_aggregate` raises, and EngineError where a replica was lost.
        """
        ...

    async def tokens_of(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        """Return the ids of a text as it is, or of a conversation with its generation prompt."""
        ...

    async def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Raises InputError where the tokenizer is not known."""
        ...

    async def probe(self, adapter: str | None = None) -> None:
        """Get one token from every pool, with an adapter from those that answer with it. Raises EngineError."""
        ...


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


class AggregatorReplica(EngineReplica):
    """Serve deployment class. `run` is called with `handle.options(stream=True)`, the rest plainly."""

    def __init__(
        self,
        config: EngineConfig,
        adapters: Mapping[str, str],
        *proposers: DeploymentHandle,
        template: str,
        shares: Sequence[float],
        proposers_take_adapters: bool,
        stream_interval_s: float = 0.0,
        least_lora_rank: int = 0,
        traces: TracesConfig | None = None,
    ) -> None:
        super().__init__(config, adapters, "Aggregator", stream_interval_s, least_lora_rank, traces)
        self.proposers = tuple(by_own_transport(handle) for handle in proposers)
        self.template = AggregatorTemplate.load(template)
        self.shares = shares
        self.proposers_take_adapters = proposers_take_adapters
        self._connecting: asyncio.Task[Aggregator] | None = None
        self._usage: Bills[list[LayerUsage]] = Bills()

    async def connected(self) -> Aggregator:
        """Return the aggregator over its own engine and the proposer pools, which it first waits for."""
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> Aggregator:
        from aft_ray.serving.handle_engine import HandleEngine

        own = Role(engine=self.hosted, format=await asyncio.to_thread(load_format, self.hosted.info))
        proposers: list[Role] = []
        for handle, share in zip(self.proposers, self.shares, strict=True):
            engine = await HandleEngine.connect(handle)
            prompt_format = await asyncio.to_thread(load_format, engine.info)
            proposers.append(Role(engine=engine, format=prompt_format, share=share))
        return Aggregator(
            proposers=tuple(proposers) or (own,),
            aggregator=own,
            template=self.template,
            proposers_take_adapters=self.proposers_take_adapters,
        )

    async def run(self, routed: Routed[RunRequest]) -> AsyncGenerator[Event | RunFailed, None]:
        """Yield what the ingress sends on: the final answer as it is written, and drafts where the client sees them.

        A run that fails ends with `RunFailed`. What a cancelled one cost is told by `usage_of`.
        """
        request = routed.payload
        usage: list[LayerUsage] = []
        with self._usage.keeping(request.run_id, lambda: usage):
            try:
                aggregator = await self.connected()
                events = (
                    aggregator.run(request, usage.append)
                    if self.traces is None or request.trace is None
                    else self.traces.run(request, request.trace, aggregator, usage.append)
                )
                async with aclosing(events):
                    async for event in events:
                        if isinstance(event, Finished):
                            yield dataclasses.replace(event, layers=event.layers[-1:], messages=())
                        elif isinstance(event, AnswerDelta) or request.shows_drafts:
                            yield event
            except AftError as error:
                yield RunFailed(error=error, usage=tuple(usage))

    async def run_whole(self, routed: Routed[RunRequest]) -> list[Event | RunFailed]:
        """Return what `run` yields, for a request that nobody watches: Serve then makes one call and no stream."""
        async with aclosing(self.run(routed)) as events:
            return [event async for event in events]

    async def usage_of(self, routed: Routed[str]) -> list[LayerUsage] | None:
        """Return what a cancelled run cost, by its id; None where it never began here."""
        return await self._usage.of(routed.payload)

    async def tokens_of(self, text: str | Sequence[Message]) -> tuple[int, ...]:
        return await (await self.connected()).tokens_of(text)

    async def text_of(self, ids: Sequence[int]) -> str:
        return await (await self.connected()).text_of(ids)

    async def pool_info(self) -> PoolInfo:
        return (await self.connected()).info

    async def probe(self, adapter: str | None = None) -> None:
        await (await self.connected()).probe(adapter)


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
