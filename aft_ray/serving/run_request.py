"""What the ingress and the aggregators say to each other: a run is asked for, and its events come back.

    ingress --RunRequest--> `Answers.run` --events, RunFailed--> ingress

`Answers` is either of two: replicas behind Serve (`aggregator_pool.py`), or an `Aggregator` in the same process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aft_ray.engines.base import EngineInfo, SpanParent
from aft_ray.errors import AftError
from aft_ray.inference.events import Event, LayerUsage
from aft_ray.inference.plan import FinalLayer, Plan
from aft_ray.records import Message


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
