"""One ingress replica's connection to the shared control: admission, and the adapter that a model name stands for.

Every request asks `control.Control` once, before anything else. The answer says whether it may run and with which
adapters, so limits hold at whichever replica a request arrives, and a name moves for all replicas at the same instant.

Giving each replica a share of the limits would save the round trip (about a millisecond), but it would refuse requests
while other replicas have room, make no sense for a key that may have two concurrent requests, and change whenever
replicas start or stop. If the actor dies, Serve starts another one; requests wait for it up to `PATIENCE_S` and then
get 503. The new actor learns its state from the gates: each reports its open requests and its table before it asks
anything.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from aft_ray.config import KeyLimits, ServingConfig
from aft_ray.serving.admission import Admitted, Table, Ticket
from aft_ray.serving.http_errors import HttpError

logger = logging.getLogger("ray.serve.aft_ray")

ACTOR = "control"
PATIENCE_S = 30.0
"""How long a request waits for an actor that is being replaced. Serve looks for dead actors every ten seconds."""
CALL_S = 2.0
"""How long one call of the actor may take before the actor counts as dead."""
RENEW_S = 1.0
"""Interval between two reports to the control."""


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
        self._leaving: set[asyncio.Task[None]] = set()
        if isinstance(ask, ControlActorClient):
            ask.greet = self._greet

    async def enter(self, ticket: Ticket, limits: KeyLimits, names: Sequence[str | None]) -> Ticket:
        """Admit a request and return its ticket with the adapters it uses, or raise HttpError.

        429 over a limit; 400 where the request alone exceeds a limit; 503 while draining; 404 where the model is gone.
        """
        self._asking.add(ticket.id)
        try:
            answer = await self.ask("admit", self._ingress, ticket, limits, tuple(names))
        except BaseException:
            self.leave(ticket, 0)
            raise
        finally:
            self._asking.discard(ticket.id)
        if isinstance(answer, Admitted):
            self.table = answer.table
            self._open[ticket.id] = answer.ticket
            return answer.ticket
        if isinstance(answer, Table):
            self.table = answer
            if answer.draining:
                raise HttpError(
                    503, "the server is shutting down", code="draining", type="unavailable", retry_after_s=5
                )
            raise HttpError(404, "this model has just been removed", param="model", code="model_not_found")
        if answer.retry_after_s is None:
            raise HttpError(400, answer.message, code="request_too_large")
        raise HttpError(
            429, answer.message, code="rate_limit_exceeded", type="rate_limit_error", retry_after_s=answer.retry_after_s
        )

    def leave(self, ticket: Ticket, num_tokens: int) -> None:
        """Report that a request has ended, without waiting for the answer. The next renewal implies the same."""
        self._open.pop(ticket.id, None)
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
        self.table = await self.ask("change", **changes)

    async def open_requests(self) -> dict[str, Any]:
        """Return the requests and tokens under way at all ingress replicas (`Control.open_requests`)."""
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
        self.table = await self.ask("renew", state=self._what_is_open)

    async def _greet(self, actor: Any) -> None:
        self.table = await _call(actor, "renew", *self._what_is_open())

    def _what_is_open(self) -> tuple[str, list[Ticket], set[str], Table]:
        return self._ingress, list(self._open.values()), set(self._asking), self.table

    async def keep_renewing(self) -> None:
        """Renew every `RENEW_S`, for as long as the replica lives."""
        while True:
            try:
                await self.renew()
            except HttpError:
                pass  # logged where it was raised
            except Exception as error:  # process boundary: this task must not end before its replica
                logger.error("the report to the control actor failed: %s", type(error).__name__)
            await asyncio.sleep(RENEW_S)
