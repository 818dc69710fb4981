"""One ingress replica's connection to the shared control: admission, and the adapter that a model name stands for.

A request is admitted from the replica's lease (`lease.py`) where there is one with room for it, which costs no call;
else it asks `control.Control`. Requests of keys with limits of their own always ask: a share of two concurrent requests
makes no sense. Near a limit of the server there are no leases, and every request asks. So limits hold at whichever
replica a request arrives, no request is refused while another replica has room, and a name moves for all replicas at
the same instant: a change waits until all leases are returned.

If the actor dies, Serve starts another one; requests wait for it up to `PATIENCE_S` and then get 503. The new actor
learns its state from the gates: each reports its open requests, its lease and its table before it asks anything, and
for `LEASE_S` the new actor only listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from aft_ray.config import KeyLimits, ServingConfig
from aft_ray.serving.errors import HttpError
from aft_ray.serving.limits.admission import LEASE_S, Admitted, Renewal, Report, Table, Ticket, Wait
from aft_ray.serving.limits.lease import Lease

logger = logging.getLogger("ray.serve.aft_ray")

ACTOR = "control"
PATIENCE_S = 30.0
"""How long a request waits for an actor that is being replaced. Serve looks for dead actors every ten seconds."""
CALL_S = 2.0
"""How long one call of the actor may take before the actor counts as dead."""
RENEW_S = 1.0
"""Longest interval between two reports to the control."""
LEASED_RENEW_S = 0.4
"""Interval between two reports while there is a lease."""
ASK_AGAIN_S = 0.05
"""Interval between two questions of a request or a change that waits for leases."""
UNLIMITED = KeyLimits()


class ControlClient(Protocol):
    """Calls the control of a gate: `await ask("open_requests")`.

    A call may have to wait for an actor that is being replaced. `state` gives the call's last arguments, and is called
    only when the call is sent, so that they are current then.
    """

    async def __call__(
        self, method: str, *args: Any, state: Callable[[], tuple[Any, ...]] = tuple, **kwargs: Any
    ) -> Any: ...


class ControlActorClient:
    """Asks the control actor of this replica's deployment, and finds its successor when it has been replaced."""

    def __init__(self) -> None:
        self._actor: Any = None
        self.greet: Callable[[Any], Awaitable[None]] | None = None
        """Called with each new actor, before it is asked anything."""

    async def __call__(
        self, method: str, *args: Any, state: Callable[[], tuple[Any, ...]] = tuple, **kwargs: Any
    ) -> Any:
        from ray.exceptions import RayActorError

        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                actor = self._actor or await self._meet()
                async with asyncio.timeout(CALL_S):
                    return await _call(actor, method, *args, *state(), **kwargs)
            except (RayActorError, TimeoutError, ValueError) as error:  # ValueError: no actor of that name yet
                self._actor = None
                if time.monotonic() > give_up:
                    logger.error("the control actor does not answer: %s", type(error).__name__)
                    raise HttpError(
                        503,
                        "the server is restarting; try again",
                        code="unavailable",
                        type="unavailable",
                        retry_after_s=2,
                    ) from None
                await asyncio.sleep(0.1)

    async def _meet(self) -> Any:
        from ray import serve

        actor = await asyncio.to_thread(serve.get_deployment_actor, ACTOR)
        if self.greet is not None:
            async with asyncio.timeout(CALL_S):
                await self.greet(actor)
        self._actor = actor
        return actor


def _call(actor: Any, method: str, *args: Any, **kwargs: Any) -> Awaitable[Any]:
    """Call the actor outside the request's context, because Ray cancels a request's actor calls when its client leaves.

    These calls must not be cancelled: `release` has to arrive, and after one call had been cancelled before it was
    sent, the actor answered no further call of this process (Ray 2.60; ray-project/ray#66020 describes cancelled calls
    in the queue of an ordered actor). Ray finds the parent request in a context variable, so the call gets an empty
    context.
    """
    answer: Awaitable[Any] = contextvars.Context().run(getattr(actor, method).remote, *args, **kwargs)
    return answer


class Gate:
    """The open requests of one ingress replica, and the latest table that it knows."""

    def __init__(self, ask: ControlClient, config: ServingConfig) -> None:
        self.ask = ask
        self.table = Table.configured(config.adapters or {})
        self._ingress = uuid.uuid4().hex
        self._open: dict[str, Ticket] = {}
        self._asking: set[str] = set()
        """Tickets that wait for their admission. A control that has admitted them must keep them open; another must not
        admit them because of the report."""
        self._lease = Lease()
        self._leased: dict[str, float] = {}
        """When each open request of the lease was admitted, by ticket."""
        self._ended: list[float] = []
        """Seconds of the requests of the lease that have ended since the last report."""
        self._control: str | None = None
        self._hurry = asyncio.Event()
        """Set where the next report should not wait for its time."""
        self._leaving: set[asyncio.Task[None]] = set()
        if isinstance(ask, ControlActorClient):
            ask.greet = self._greet

    async def enter(self, ticket: Ticket, limits: KeyLimits, names: Sequence[str | None]) -> Admitted:
        """Admit a request: return its ticket with the adapters it uses and what its key has left, or raise HttpError.

        429 over a limit; 400 where the request alone exceeds a limit; 503 while draining; 404 where the model is gone.
        """
        leased = self._leased_ticket(ticket, names) if limits == UNLIMITED else None
        if leased is not None:
            return Admitted(ticket=leased, table=self.table)
        answer = await self._asked(ticket, limits, names)
        if isinstance(answer, Admitted):
            self._learn(answer.table)
            self._open[ticket.id] = answer.ticket
            return answer
        if isinstance(answer, Table):
            self._learn(answer)
            if answer.draining:
                raise HttpError(
                    503, "the server is shutting down", code="draining", type="unavailable", retry_after_s=5
                )
            raise HttpError(404, "this model has just been removed", param="model", code="model_not_found")
        if answer.retry_after_s is None:
            raise HttpError(400, answer.message, code="request_too_large")
        raise HttpError(
            429,
            answer.message,
            code="rate_limit_exceeded",
            type="rate_limit_error",
            retry_after_s=answer.retry_after_s,
            headers=answer.room.headers,
        )

    def _leased_ticket(self, ticket: Ticket, names: Sequence[str | None]) -> Ticket | None:
        """Admit a request from the lease; None where it must ask."""
        adapters = self.table.adapters
        if self.table.draining or any(name is not None and name not in adapters for name in names):
            return None
        if not self._lease.take(ticket.num_tokens):
            if not self._lease.is_scarce:
                self._hurry.set()
            return None
        paths = tuple(None if name is None else adapters[name].path for name in names)
        ticket = Ticket(id=ticket.id, key=ticket.key, num_tokens=ticket.num_tokens, adapters=paths)
        self._open[ticket.id] = ticket
        self._leased[ticket.id] = time.monotonic()
        return ticket

    async def _asked(self, ticket: Ticket, limits: KeyLimits, names: Sequence[str | None]) -> Any:
        """Ask the control for admission, again for as long as others may return their leases."""
        patience = time.monotonic() + LEASE_S
        self._asking.add(ticket.id)
        try:
            while True:
                may_wait = time.monotonic() < patience
                answer = await self.ask("admit", self._ingress, ticket, limits, tuple(names), may_wait)
                if not isinstance(answer, Wait):
                    return answer
                self._hurry.set()  # this replica may hold a lease itself
                await asyncio.sleep(ASK_AGAIN_S)
        except BaseException:
            self.leave(ticket, 0)
            raise
        finally:
            self._asking.discard(ticket.id)

    def leave(self, ticket: Ticket, num_tokens: int) -> None:
        """Report that a request has ended, without waiting for the answer. The next renewal implies the same."""
        self._open.pop(ticket.id, None)
        began = self._leased.pop(ticket.id, None)
        if began is not None:
            self._ended.append(time.monotonic() - began)
            if self._lease.give_back(ticket.num_tokens):
                return
        task = asyncio.get_running_loop().create_task(self._release(ticket.id, num_tokens))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _release(self, ticket_id: str, num_tokens: int) -> None:
        try:
            await self.ask("release", self._ingress, ticket_id, num_tokens)
        except HttpError:  # the control is gone; the next renewal informs its successor
            return

    async def change(self, **changes: Any) -> None:
        """Move names, note taken adapters, start or stop draining (`Control.change`)."""
        while True:
            answer = await self.ask("change", **changes)
            if isinstance(answer, Table):
                self._learn(answer)
                return
            await self.renew()  # which returns this replica's own lease
            await asyncio.sleep(ASK_AGAIN_S)

    async def open_requests(self) -> dict[str, Any]:
        """Return the requests and tokens under way at all ingress replicas (`Control.open_requests`).

        Those that another replica has admitted from its lease since its last report are not known yet.
        """
        await self.renew()
        found: dict[str, Any] = await self.ask("open_requests")
        return found

    async def may_watch(self) -> bool:
        """Whether this ingress replica is the one that watches the adapter folder on behalf of all."""
        return bool(await self.ask("may_watch", self._ingress))

    async def renew(self) -> None:
        """Report the open requests and learn the current table.

        The report is made when the call is sent. An older one would make a new actor forget the requests that it has
        admitted in the meantime.
        """
        self._renewed(await self.ask("renew", state=self._report))

    async def _greet(self, actor: Any) -> None:
        self._renewed(await _call(actor, "renew", *self._report()))

    def _report(self) -> tuple[Report]:
        number, kept, wanted = self._lease.reported()
        ended, self._ended = self._ended, []
        report = Report(
            ingress=self._ingress,
            number=number,
            tickets=list(self._open.values()),
            asking=set(self._asking),
            table=self.table,
            control=self._control,
            kept=kept,
            wanted=wanted,
            num_ended=len(ended),
            mean_seconds=sum(ended) / max(1, len(ended)),
        )
        return (report,)

    def _renewed(self, renewal: Renewal) -> None:
        self._control = renewal.control
        self._learn(renewal.table)
        self._lease.renewed(renewal)
        if renewal.is_recalled and renewal.lease.num_requests:
            self._hurry.set()

    def _learn(self, table: Table) -> None:
        """Take a table, unless a newer one is known: answers may come out of order."""
        if table.version >= self.table.version:
            self.table = table

    async def keep_renewing(self) -> None:
        """Renew every `RENEW_S`, or sooner, for as long as the replica lives."""
        while True:
            self._hurry.clear()
            try:
                await self.renew()
            except HttpError:
                pass  # logged where it was raised
            except Exception as error:  # process boundary: this task must not end before its replica
                logger.error("the report to the control actor failed: %s", type(error).__name__)
            interval_s = min(RENEW_S, LEASED_RENEW_S) if self._lease.is_needed else RENEW_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._hurry.wait()
                    await asyncio.sleep(ASK_AGAIN_S)  # not for every request that hurries
