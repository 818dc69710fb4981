"""An engine waits for the memory of its GPUs, and says who holds it when it does not come free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from aft_ray.engines.gpu_memory import GIB, GpuMemory, wait_for_gpu_memory
from aft_ray.errors import EngineError


def readings(*free_gib: float) -> Callable[[], Sequence[GpuMemory]]:
    """Return a reader of two GPUs of 80 GiB: the first is free, the second as much as these say, look by look."""
    left = list(free_gib)

    def read() -> Sequence[GpuMemory]:
        free = left.pop(0) if len(left) > 1 else left[0]
        return [
            GpuMemory(name="GPU 0", free=80 * GIB, total=80 * GIB),
            GpuMemory(name="GPU 1", free=int(free * GIB), total=80 * GIB, pids=(41, 42)),
        ]

    return read


def test_it_returns_when_every_gpu_has_the_share_free(caplog: pytest.LogCaptureFixture) -> None:
    wait_for_gpu_memory(0.9, readings(10, 40, 72), poll_s=0)
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting: GPU 1 has {free}.0 of 80.0 GiB free, and the engine takes 72.0 (gpu_memory_utilization 0.9)"
        for free in (10, 40)
    ]


def test_memory_that_does_not_come_free_ends_in_a_sentence() -> None:
    with pytest.raises(EngineError, match=r"GPU 1 has 10\.0 of 80\.0 GiB .* Memory is held by processes 41, 42\. End"):
        wait_for_gpu_memory(0.9, readings(10), wait_s=0.05, poll_s=0.01)


def test_without_a_visible_gpu_there_is_nothing_to_wait_for() -> None:
    wait_for_gpu_memory(0.9, lambda: [])
