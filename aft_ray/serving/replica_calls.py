"""Calls of the replicas of a pool: streamed, cancelled, and billed however they end.

    calls = ReplicaCalls(handle, method="run", bill="usage_of")
    async with aclosing(calls.events("run-1", request, num_samples=5, on_bill=bill.extend)) as events:
        async for event in events: ...

Closing the generator cancels the call; Serve passes that on to the replica, which aborts what it was doing. The replica
that took the call is then asked what it had cost until then.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from aft_ray.errors import AftError, EngineError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve.aft_ray")

T = TypeVar("T")

MAX_LOST = 3
"""Number of replicas that one request may lose before it fails."""
BILL_S = 5.0
"""How long a replica may take to end a cancelled call and to say what it cost."""


@dataclass(kw_only=True)
class Routed(Generic[T]):
    """The argument of a call of a replica."""

    payload: T
    num_samples: int = 0
    """Number of samples that the call asks for."""
    replica: str | None = None
    """Id of the replica that took the call. Set by the caller: the replica that should take it, if it still runs."""


class ReplicaLost(EngineError):
    """The replica that was answering died."""


def as_aft_error(error: Exception) -> AftError:
    """Convert what a handle raised: to the replica's own AftError where it raised one, else to an EngineError.

    Ray wraps a remote exception in one whose text holds the remote traceback, which no client must see.
    """
    cause = getattr(error, "cause", error)
    if isinstance(cause, AftError):
        return type(cause)(*cause.args)
    return EngineError(f"an engine replica could not answer ({type(cause).__name__})")


def by_own_transport(handle: DeploymentHandle) -> DeploymentHandle:
    """Return a handle whose calls go as `RAY_SERVE_USE_GRPC_BY_DEFAULT` says in this process.

    A handle that was bound carries the choice of the process that bound it, and makes Ray calls, which take twice the
    processor time, where that process had imported Serve before the variable was set.
    """
    from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT

    own: DeploymentHandle = handle.options(_by_reference=not RAY_SERVE_USE_GRPC_BY_DEFAULT)
    return own


def sent(method: Any, *args: Any) -> Any:
    """Call a method of a handle outside the request's context, and return the response.

    Serve gives all calls that a request makes the request's own id, by which its router finds the call that a replica
    has accepted. Of two calls of one deployment that are waiting for a replica at the same time, one would wait for
    ever (Ray 2.60, `RequestRouter._pending_requests_by_id`). Outside, each call has an id of its own. Ray does not
    cancel it together with the request either, which `ReplicaCalls` does itself, and must not do to the question for
    the bill.
    """
    return contextvars.Context().run(method.remote, *args)


class ReplicaCalls:
    """Calls of one streamed method of a deployment, and of the method that bills them.

    `whole` names a method that returns all events at once, as a list, which costs Serve less.
    """

    def __init__(self, handle: DeploymentHandle, *, method: str, bill: str, whole: str | None = None) -> None:
        self._stream = getattr(handle.options(stream=True), method)  # made once, because that costs half a millisecond
        self._whole = None if whole is None else getattr(handle, whole)
        self._bill = getattr(handle, bill)
        self._handle, self._bill_name = handle, bill

    async def events(
        self, call_id: str, payload: Any, num_samples: int, on_bill: Callable[[Any], None], *, at_once: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Yield what one replica yields; with `at_once`, when all of it is there.

        `on_bill` is called with the cost of a call that is closed before its end. `call_id` names the call in the
        replica; no other call may have the same one. Raises ReplicaLost, or the error of the replica.
        """
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import RayServeException

        routed = Routed(payload=payload, num_samples=num_samples)
        whole = self._whole if at_once else None
        response: Any = sent(whole or self._stream, routed)
        done = False
        try:
            if whole is not None:
                events = await response
                done = True
                for event in events:
                    yield event
            else:
                async for event in response:
                    yield event
            done = True
        except RayActorError:
            done = True
            raise ReplicaLost("the engine replica that was answering died") from None
        except (RayError, RayServeException, AftError) as error:
            done = True
            logger.warning("call %s: %s", call_id, type(error).__name__)
            raise as_aft_error(error) from None
        finally:
            if not done:
                response.cancel()
                await to_its_end(self._collect(call_id, routed, on_bill))

    async def _collect(self, call_id: str, routed: Routed[Any], on_bill: Callable[[Any], None]) -> None:
        """Ask the replica that took a cancelled call what it cost."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        question = Routed(payload=call_id, replica=routed.replica)
        try:
            async with asyncio.timeout(BILL_S):
                if routed.replica is None:  # cancelled while a replica may just have taken it
                    response = contextvars.Context().run(self._handle.broadcast, self._bill_name, question)
                    bills = await response.results_async()
                else:
                    bills = [await sent(self._bill, question)]
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("call %s was cancelled, and its replica did not say what it cost: %s", call_id, error)
            return
        for bill in bills:
            if bill is not None:
                on_bill(bill)


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that must not be cut off, for a task that is cancelled and may be cancelled again meanwhile."""
    task, interrupted = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            interrupted = error
    task.result()
    if interrupted is not None:
        raise interrupted


async def answer_of(response: Any) -> Any:
    """Return the answer of a plain call. Raises ReplicaLost, or the error of the replica."""
    from ray.exceptions import RayActorError, RayError
    from ray.serve.exceptions import RayServeException

    try:
        return await response
    except RayActorError:
        raise ReplicaLost("the engine replica that was answering died") from None
    except (RayError, RayServeException, AftError) as error:
        raise as_aft_error(error) from None
