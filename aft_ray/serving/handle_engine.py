"""A Serve deployment as an `Engine`, so that the code that runs on a local engine runs unchanged on replicas.

    engine = await HandleEngine.connect(handle)
    async with aclosing(engine.generate(request)) as events: ...

Closing the generator cancels the call; Serve passes that on to the replica, which aborts the request in its engine. The
answers that a lost replica was writing are requested from another one, unless a client has already read part of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from aft_ray.engines.base import EngineEvent, EngineInfo, GenerateRequest, Sample
from aft_ray.errors import AftError, EngineError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve.aft_ray")

MAX_LOST = 3
"""Number of replicas that one request may lose before it fails."""


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


class HandleEngine:
    """An `Engine` over a `DeploymentHandle` of `EngineReplica`s."""

    def __init__(self, handle: DeploymentHandle, info: EngineInfo) -> None:
        self._handle = handle
        self._generate = handle.options(stream=True).generate  # made once, because that costs half a millisecond
        self._info = info

    @classmethod
    async def connect(cls, handle: DeploymentHandle) -> HandleEngine:
        """Wait until a replica describes its engine, and return the engine over the handle."""
        return cls(handle, await handle.info.remote())

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        left = list(range(len(request.seeds)))
        """Positions of the samples that have not ended yet."""
        for attempt in range(MAX_LOST + 1):
            asked = dataclasses.replace(
                request,
                request_id=f"{request.request_id}/again-{attempt}" if attempt else request.request_id,
                seeds=tuple(request.seeds[position] for position in left),
            )
            positions, begun = tuple(left), set()
            try:
                async with aclosing(self._ask_once(asked)) as events:
                    async for event in events:
                        event = dataclasses.replace(event, index=positions[event.index])
                        if isinstance(event, Sample):
                            left.remove(event.index)
                        elif not request.is_unread:
                            begun.add(event.index)
                        yield event
                return
            except ReplicaLost as error:
                for position in begun & set(left):
                    left.remove(position)
                    yield _lost(position, request.seeds[position], error)
                if not left:
                    return
                if attempt == MAX_LOST:
                    raise
                logger.warning("request %s: lost a replica, asking another one", request.request_id)

    async def _ask_once(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        """Yield the events of one replica. Closing the generator cancels the call."""
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import RayServeException

        response: Any = self._generate.remote(request)
        done = False
        try:
            async for event in response:
                yield event
            done = True
        except RayActorError:
            done = True
            raise ReplicaLost("the engine replica that was answering died") from None
        except (RayError, RayServeException) as error:
            done = True
            logger.warning("request %s: %s", request.request_id, type(error).__name__)
            raise as_aft_error(error) from None
        finally:
            if not done:
                response.cancel()

    async def score(
        self, prompt_ids: Sequence[int], continuation_ids: Sequence[int], adapter: str | None = None
    ) -> list[float]:
        return await self._call(self._handle.score.remote(list(prompt_ids), list(continuation_ids), adapter))

    async def check(self) -> None:
        """Check one replica. Serve checks every replica by itself and restarts those that fail."""
        await self._call(self._handle.check_health.remote())

    async def _call(self, response: Any) -> Any:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            return await response
        except (RayError, RayServeException) as error:
            raise as_aft_error(error) from None

    async def close(self) -> None:
        """Do nothing: the replicas belong to Serve."""


def _lost(position: int, seed: int, error: ReplicaLost) -> Sample:
    return Sample(
        index=position,
        text="",
        token_ids=(),
        finish_reason="error",
        num_prompt_tokens=0,
        num_tokens=0,
        seed=seed,
        error=str(error),
    )
