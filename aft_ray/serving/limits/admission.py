"""Admission control: how many requests may run at once, and how many tokens they may cost, in all and per key. Pure.

The cost of a request is the most that its plan may read and write. With K=5, L=1, max_tokens=512 everywhere and a
prompt of P tokens, five drafts read P and write 512 each, and the last answer reads P and the drafts: 5 x (P + 512) +
(P + 5 x 512) + 512. The whole cost is reserved when the request arrives. When it ends, `tokens_per_minute` is charged
what the engines were asked to read and wrote: the rest is given back, and what a lost replica's work cost beyond the
reservation becomes a debt that later requests of the key wait for. A request over a limit is refused at once, with the
number of seconds after which to try again, so no queue grows.

An ingress replica may hold a *lease*: room for requests that it admits by itself (`lease.py`). Leased room counts as
used, whether or not it is, so the limits hold over all replicas.

The state is soft. Every ingress replica reports its open requests and its lease once a second or more often. Those of a
replica that is lost are forgotten after `LOST_S`, and a new `Admission` has the complete state again after one round of
reports.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from aft_ray.config import AdmissionConfig, KeyLimits
from aft_ray.inference.plan import Plan
from aft_ray.serving.adapters import Adapter, AdapterStamp

LOST_S = 10.0
"""An ingress replica that has not reported for this long is lost, and its requests with it."""
MAX_RETRY_S = 60
LEASE_S = 2.0
"""How long an ingress replica may admit from its lease after it has sent the report that the lease answers."""
LEAST_LEASE = 4
"""The smallest lease, in requests: less is not worth it, and near a limit every request asks."""
LEASE_SHARE = 4
"""A lease may take one part in so many of the room that is left."""
RECALL_S = 5.0
"""How long no lease is given after leases stood in the way of a request or of a change."""


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """One request that is admitted, or asks to be."""

    id: str
    key: str
    """Name of the API key; empty where the server asks for none."""
    num_tokens: int
    """Most tokens that the request may cost (`cost_of`)."""
    adapters: tuple[str | None, ...] = ()
    """Adapter folders that the request uses, and that must exist until it ends. None: the base model."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a key has left after a request was admitted or refused. None: no limit."""

    HEADERS: ClassVar[tuple[str, ...]] = (
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-limit-tokens",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-tokens",
    )

    limit_requests: int | None = None
    remaining_requests: int | None = None
    limit_tokens: int | None = None
    remaining_tokens: int | None = None
    reset_tokens_s: int | None = None
    """Seconds until all of its tokens per minute are there again."""

    @property
    def headers(self) -> dict[str, str]:
        """The room as the headers that OpenAI sends with every answer."""
        reset = None if self.reset_tokens_s is None else f"{self.reset_tokens_s}s"
        values = (self.limit_requests, self.remaining_requests, self.limit_tokens, self.remaining_tokens, reset)
        return {name: str(value) for name, value in zip(self.HEADERS, values, strict=True) if value is not None}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A request may not run now; with `retry_after_s` None it never may, because it alone exceeds a limit."""

    message: str
    retry_after_s: int | None
    room: Room = Room()


@dataclass(frozen=True, kw_only=True)
class Table:
    """What every ingress replica knows: which adapter each model name stands for, and whether the server drains."""

    version: int = 0
    """Grows with every change: of two tables, the one with the larger version is the newer."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    taken: Mapping[str, AdapterStamp] = field(default_factory=dict)
    """The adapters of the watched folder that need no further look, by name: served, or found impossible to serve."""
    draining: bool = False
    """Whether new requests are refused because the server is about to stop."""

    @classmethod
    def configured(cls, adapters: Mapping[str, str]) -> Table:
        """Return the first table of a server, from the adapter folders that its config names."""
        return cls(adapters={name: Adapter.configured(path) for name, path in adapters.items()})


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request may run. Its ticket names the adapters it runs with."""

    ticket: Ticket
    table: Table
    room: Room = Room()


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Ask again in a moment: the other ingress replicas return their leases, or a new control learns what is open."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """Room for requests, and for the most tokens that they may cost."""

    num_requests: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an ingress replica says of itself: its open requests, its table, and its lease."""

    ingress: str
    number: int
    """Of two reports, the one with the larger number is the newer. The answer repeats it."""
    tickets: Sequence[Ticket]
    """Its open requests."""
    asking: Collection[str]
    """Ids of the tickets whose admission it is still waiting for."""
    table: Table
    control: str | None = None
    """Id of the control that answered its last report; None before the first."""
    kept: Amount = Amount()
    """What it keeps of its lease, and may use before this report is answered."""
    wanted: Amount = Amount()
    """The lease that it could use."""
    num_ended: int = 0
    """Number of requests admitted from the lease that have ended since the last report, for Retry-After."""
    mean_seconds: float = 0.0
    """How long these took on average."""


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """The answer to a report."""

    number: int
    control: str
    """Id of the control that answers."""
    table: Table
    lease: Amount = Amount()
    """What the ingress replica may admit by itself: never less than it kept."""
    is_recalled: bool = False
    """Whether it must return its lease with its next report, at once."""


def cost_of(plan: Plan, num_prompt_tokens: int, num_choices: int = 1) -> int:
    """Return the most tokens that a plan may cost: every answer with all that it reads; hedged drafts, twice."""
    cost, is_vote = 0, bool(plan.num_layers) and plan.aggregator == "vote"
    num_read = num_prompt_tokens
    for layer in range(plan.num_layers + (not is_vote)):
        num_written = plan.sampling_of(layer).max_tokens
        is_last = layer == plan.num_layers
        num_answers = num_choices if is_last else plan.num_proposals * (1 if plan.hedge_s is None else 2)
        cost += num_answers * (num_read + num_written)
        num_read = num_prompt_tokens + (plan.subset_size or plan.num_proposals) * num_written
    return cost


class Admission:
    """The open requests of all ingress replicas, and the limits on them."""

    def __init__(self, config: AdmissionConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.clock = clock
        self._open: dict[str, dict[str, tuple[Ticket, float]]] = {}
        """The ticket and its time of admission, by ingress replica and ticket id."""
        self._heard: dict[str, float] = {}
        self._spent: dict[str, tuple[float, float]] = {}
        """Tokens charged and not yet paid off at `tokens_per_minute`, and the time of that balance, by key."""
        self._leases: dict[str, Amount] = {}
        """What each ingress replica may still admit by itself, by its last report."""
        self._recalled_until = -math.inf
        self._mean_seconds = 1.0
        """Moving average of how long requests take, on which Retry-After is based."""

    @property
    def tickets(self) -> list[Ticket]:
        """The tickets of all open requests."""
        return [ticket for tickets in self._open.values() for ticket, _ in tickets.values()]

    def admit(self, ingress: str, ticket: Ticket, limits: KeyLimits, *, may_wait: bool = True) -> Refusal | Wait | None:
        """Admit a request (None), or refuse it. A ticket that is presented twice counts once.

        Where only leases are in its way, they are recalled, and it waits for them if it may.
        """
        self.note_alive(ingress)
        mine = self._open.setdefault(ingress, {})
        if ticket.id in mine:
            return None
        refusal = self._refusal(ticket, limits, self._leased)
        if refusal is not None and self.has_leases and self._refusal(ticket, limits, Amount()) is None:
            self.recall()
            return Wait() if may_wait else refusal
        if refusal is None:
            mine[ticket.id] = (ticket, self.clock())
            if limits.tokens_per_minute:
                level = self._level(ticket.key, limits.tokens_per_minute)
                self._spent[ticket.key] = (level + ticket.num_tokens, self.clock())
        return refusal

    def room(self, key: str, limits: KeyLimits) -> Room:
        """Return what a key has left now."""
        requests, rate = limits.max_requests, limits.tokens_per_minute
        num_open = sum(ticket.key == key for ticket in self.tickets)
        level = 0.0 if rate is None else self._level(key, rate)
        return Room(
            limit_requests=requests,
            remaining_requests=None if requests is None else max(0, requests - num_open),
            limit_tokens=rate,
            remaining_tokens=None if rate is None else max(0, math.floor(rate - level)),
            reset_tokens_s=None if rate is None else math.ceil(60 * level / rate),
        )

    def release(self, ingress: str, ticket_id: str, num_tokens: int) -> None:
        """Note that a request has ended and that it cost `num_tokens`."""
        ticket, since = self._open.get(ingress, {}).pop(ticket_id, (None, 0.0))
        if ticket is None:
            return
        self.note_ended(1, self.clock() - since)
        if ticket.key in self._spent:
            spent, when = self._spent[ticket.key]
            self._spent[ticket.key] = (spent + num_tokens - ticket.num_tokens, when)

    def renew(self, ingress: str, tickets: Sequence[Ticket], asking: Collection[str] = ()) -> None:
        """Replace what is known of one ingress replica by its report: `tickets` are its open requests.

        Requests that it is still `asking` for stay open if they were admitted, but the report does not admit them.
        """
        now = self.clock()
        known = self._open.get(ingress, {})
        self._open[ingress] = {
            **{number: known[number] for number in asking if number in known},
            **{ticket.id: known.get(ticket.id, (ticket, now)) for ticket in tickets},
        }
        self.note_alive(ingress)

    def lease(self, ingress: str, kept: Amount, wanted: Amount) -> Amount:
        """Return the lease of an ingress replica that has just reported and keeps `kept` of its last one.

        No more is given of what is nearly used up, so that whoever asks finds room.
        """
        self._leases[ingress] = kept
        if not self.is_recalled:
            used, config = self._leased, self.config
            requests = _leased(
                config.max_requests, len(self.tickets) + used.num_requests, kept.num_requests, wanted.num_requests
            )
            tokens = _leased(
                config.max_tokens, _sum(self.tickets) + used.num_tokens, kept.num_tokens, wanted.num_tokens
            )
            if requests >= LEAST_LEASE:
                self._leases[ingress] = Amount(num_requests=requests, num_tokens=tokens)
        return self._leases[ingress]

    def recall(self) -> None:
        """Give no more leases for `RECALL_S`. Those that are held come back with the next reports of their holders."""
        self._recalled_until = self.clock() + RECALL_S

    @property
    def is_recalled(self) -> bool:
        """Whether leases must be returned."""
        return self.clock() < self._recalled_until

    @property
    def has_leases(self) -> bool:
        """Whether an ingress replica that is not lost may hold a lease."""
        self._forget_the_lost()
        return any(lease.num_requests for lease in self._leases.values())

    @property
    def _leased(self) -> Amount:
        leases = self._leases.values()
        return Amount(
            num_requests=sum(lease.num_requests for lease in leases),
            num_tokens=sum(lease.num_tokens for lease in leases),
        )

    def note_ended(self, number: int, mean_seconds: float) -> None:
        """Note how long requests took that have ended."""
        self._mean_seconds += (1 - 0.9**number) * (mean_seconds - self._mean_seconds)

    def note_alive(self, ingress: str) -> None:
        """Note that an ingress replica is alive."""
        self._heard[ingress] = self.clock()
        self._forget_the_lost()

    def is_lost(self, ingress: str) -> bool:
        """Whether an ingress replica has not reported for `LOST_S`, or never did."""
        self._forget_the_lost()
        return ingress not in self._heard

    def _refusal(self, ticket: Ticket, limits: KeyLimits, leased: Amount) -> Refusal | None:
        everyone = self.tickets
        own = [other for other in everyone if other.key == ticket.key]
        config = self.config
        rules: list[tuple[str, int | None, int, int]] = [
            ("concurrent requests on this server", config.max_requests, len(everyone) + leased.num_requests, 1),
            (
                "tokens of concurrent requests on this server",
                config.max_tokens,
                _sum(everyone) + leased.num_tokens,
                ticket.num_tokens,
            ),
            ("concurrent requests with this key", limits.max_requests, len(own), 1),
            ("tokens of concurrent requests with this key", limits.max_tokens, _sum(own), ticket.num_tokens),
        ]
        for what, limit, used, more in rules:
            if limit is None or used + more <= limit:
                continue
            if more > limit:
                return _never(more, f"{limit} {what}")
            return Refusal(message=f"the limit of {limit} {what} is reached", retry_after_s=self._retry(1.0))
        rate = limits.tokens_per_minute
        if rate is not None:
            what = f"{rate} tokens per minute with this key"
            excess = self._level(ticket.key, rate) + ticket.num_tokens - rate
            if ticket.num_tokens > rate:
                return _never(ticket.num_tokens, what)
            if excess > 0:
                return Refusal(message=f"the limit of {what} is reached", retry_after_s=self._retry(60 * excess / rate))
        return None

    def _retry(self, seconds: float) -> int:
        return max(1, min(MAX_RETRY_S, math.ceil(max(seconds, self._mean_seconds / 2))))

    def _level(self, key: str, rate: int) -> float:
        spent, when = self._spent.get(key, (0.0, 0.0))
        return max(0.0, spent - rate * (self.clock() - when) / 60)

    def _forget_the_lost(self) -> None:
        now = self.clock()
        for ingress in [name for name, heard in self._heard.items() if now - heard > LOST_S]:
            del self._heard[ingress]
            self._open.pop(ingress, None)
            self._leases.pop(ingress, None)

    def num_open_by_key(self) -> Counter[str]:
        return Counter(ticket.key for ticket in self.tickets)


def _leased(limit: int | None, used: int, kept: int, wanted: int) -> int:
    """Return how much of one limit a lease has, of which `kept` is held already."""
    free = wanted if limit is None else (limit - used) // LEASE_SHARE
    return kept + max(0, min(wanted - kept, free))


def _sum(tickets: Sequence[Ticket]) -> int:
    return sum(ticket.num_tokens for ticket in tickets)


def _never(num_tokens: int, what: str) -> Refusal:
    message = f"this request may cost {num_tokens} tokens, more than the limit of {what}"
    hint = "lower max_tokens, aft.num_proposals or aft.num_layers"
    return Refusal(message=f"{message}: {hint}", retry_after_s=None)
