"""What every use of vLLM owes for the processes behind it: their death is told from other errors, and they end."""

from __future__ import annotations

import subprocess
from typing import Any

from aft_ray.errors import EngineDead, EngineError


class VllmProcess:
    """An `AsyncLLM` and the process that ends its core when this one dies."""

    _engine: Any
    _watchdog: subprocess.Popen[Any]

    def _failure(self, what: str, error: Exception) -> EngineError:
        """Return what vLLM raised as an EngineError: EngineDead where the process of the engine's core is gone."""
        from vllm.v1.engine.exceptions import EngineDeadError

        is_dead = isinstance(error, EngineDeadError) or self._engine.errored
        return (EngineDead if is_dead else EngineError)(f"{what}: {error}")

    async def check(self) -> None:
        """Raise EngineDead when the process of the engine is gone."""
        try:
            await self._engine.check_health()
        except Exception as error:  # process boundary
            raise EngineDead(f"vLLM is not healthy: {error}") from error

    async def close(self) -> None:
        self._engine.shutdown()
        self._watchdog.terminate()
        self._watchdog.wait()
