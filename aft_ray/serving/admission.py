"""Admission control: how many requests may run at once, and how many tokens they may cost, in all and per key. Pure.

The cost of a request is its prompt plus the most that its plan may write: with K=5, L=1 and max_tokens=512 everywhere,
the prompt's tokens plus 6 x 512. The whole cost is reserved when the request arrives; what it did not use is given back
to `tokens_per_minute` when it ends. A request over a limit is refused at once, with the number of seconds after which
to try again, so no queue grows.

The state is soft. Every ingress replica reports its open requests once a second. The requests of a replica that is lost
are forgotten after `LOST_S`, and a new `Admission` has the complete state again after one round of reports.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from aft_ray.config import AdmissionConfig, KeyLimits
from aft_ray.inference.plan import Plan
from aft_ray.serving.adapters import Adapter, Stamp

LOST_S = 10.0
"""An ingress replica that has not reported for this long is lost, and its requests with it."""
MAX_RETRY_S = 60


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
class Refusal:
    """A request may not run now; with `retry_after_s` None it never may, because it alone exceeds a limit."""

    message: str
    retry_after_s: int | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """What every ingress replica knows: which adapter each model name stands for, and whether the server drains."""

    version: int = 0
    """Grows with every change: of two tables, the one with the larger version is the newer."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    taken: Mapping[str, Stamp] = field(default_factory=dict)
    """The adapters of the watched folder that need no further look, by name: served, or found impossible to serve."""
    draining: bool = False
    """Whether new requests are refused because the server is about to stop."""

    @classmethod
    def configured(cls, adapters: Mapping[str, str]) -> Table:
        """Return the first table of a server, from the adapter folders that its config names."""
        return cls(adapters={name: Adapter(path=path, version="configured") for name, path in adapters.items()})


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A request may run. Its ticket names the adapters it runs with."""

    ticket: Ticket
    table: Table


def cost_of(plan: Plan, num_prompt_tokens: int, num_choices: int = 1) -> int:
    """Return the most tokens that a plan may cost: the prompt, and each answer at its layer's max_tokens."""
    width = plan.num_proposals if plan.num_layers else 0
    drafts = sum(plan.sampling_of(layer).max_tokens for layer in range(plan.num_layers))
    last = 0 if plan.num_layers and plan.aggregator == "vote" else plan.sampling_of(plan.num_layers).max_tokens
    return width * drafts + num_choices * last + num_prompt_tokens


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
        self._mean_seconds = 1.0
        """Moving average of how long requests take, on which Retry-After is based."""

    @property
    def tickets(self) -> list[Ticket]:
        """The tickets of all open requests."""
        return [ticket for tickets in self._open.values() for ticket, _ in tickets.values()]

    def admit(self, ingress: str, ticket: Ticket, limits: KeyLimits) -> Refusal | None:
        """Admit a request (None), or refuse it. A ticket that is presented twice counts once."""
        self.note_alive(ingress)
        mine = self._open.setdefault(ingress, {})
        if ticket.id in mine:
            return None
        refusal = self._refusal(ticket, limits)
        if refusal is None:
            mine[ticket.id] = (ticket, self.clock())
            if limits.tokens_per_minute:
                level = self._level(ticket.key, limits.tokens_per_minute)
                self._spent[ticket.key] = (level + ticket.num_tokens, self.clock())
        return refusal

    def release(self, ingress: str, ticket_id: str, num_tokens: int) -> None:
        """Note that a request has ended and that it cost `num_tokens`."""
        ticket, since = self._open.get(ingress, {}).pop(ticket_id, (None, 0.0))
        if ticket is None:
            return
        self._mean_seconds += 0.1 * (self.clock() - since - self._mean_seconds)
        if ticket.key in self._spent:
            spent, when = self._spent[ticket.key]
            self._spent[ticket.key] = (spent - max(0, ticket.num_tokens - num_tokens), when)

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

    def note_alive(self, ingress: str) -> None:
        """Note that an ingress replica is alive."""
        self._heard[ingress] = self.clock()
        self._forget_the_lost()

    def is_lost(self, ingress: str) -> bool:
        """Whether an ingress replica has not reported for `LOST_S`, or never did."""
        self._forget_the_lost()
        return ingress not in self._heard

    def _refusal(self, ticket: Ticket, limits: KeyLimits) -> Refusal | None:
        everyone = self.tickets
        own = [other for other in everyone if other.key == ticket.key]
        config = self.config
        rules: list[tuple[str, int | None, int, int]] = [
            ("concurrent requests on this server", config.max_requests, len(everyone), 1),
            ("tokens of concurrent requests on this server", config.max_tokens, _sum(everyone), ticket.num_tokens),
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

    def num_open_by_key(self) -> Counter[str]:
        return Counter(ticket.key for ticket in self.tickets)


def _sum(tickets: Sequence[Ticket]) -> int:
    return sum(ticket.num_tokens for ticket in tickets)


def _never(num_tokens: int, what: str) -> Refusal:
    message = f"this request may cost {num_tokens} tokens, more than the limit of {what}"
    hint = "lower max_tokens, aft.num_proposals or aft.num_layers"
    return Refusal(message=f"{message}: {hint}", retry_after_s=None)
