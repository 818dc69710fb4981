"""Wait until the memory that an engine is going to take is free on its GPUs.

vLLM refuses to start where less than `gpu_memory_utilization` of a GPU is free. What the engine before it held, in the
stage before or in a worker that was killed, comes free a few seconds after its process was told to end.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aft_ray.errors import EngineError

logger = logging.getLogger(__name__)

WAIT_S = 120.0
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """The memory of one GPU, in bytes."""

    name: str
    free: int
    total: int
    pids: tuple[int, ...] = ()
    """Processes that hold memory on it, as far as they can be seen from here."""


def wait_for_gpu_memory(
    share: float,
    read: Callable[[], Sequence[GpuMemory]],
    wait_s: float = WAIT_S,
    poll_s: float = 1.0,
) -> None:
    """Return when `share` of every GPU is free. Raises EngineError, with who holds the memory, after `wait_s`."""
    end = time.monotonic() + wait_s
    while lacking := [gpu for gpu in read() if gpu.free < share * gpu.total]:
        gpu = lacking[0]
        text = (
            f"{gpu.name} has {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free, and the engine takes "
            f"{share * gpu.total / GIB:.1f} (gpu_memory_utilization {share:g})"
        )
        if time.monotonic() >= end:
            held = f"processes {', '.join(map(str, gpu.pids))}" if gpu.pids else "other processes"
            raise EngineError(f"{text}; waited {wait_s:.0f} s. Memory is held by {held}. End them, or lower the share")
        logger.warning("waiting: %s", text)
        time.sleep(poll_s)


def visible_gpus(num_gpus: int) -> list[GpuMemory]:
    """Read the memory of the first `num_gpus` GPUs that this process may use. No CUDA context is made."""
    from vllm.utils.import_utils import import_pynvml

    nvml: Any = import_pynvml()
    nvml.nvmlInit()
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = map(str, range(nvml.nvmlDeviceGetCount())) if visible is None else visible.split(",")
        return [_memory(nvml, name.strip()) for name in list(names)[:num_gpus] if name.strip()]
    finally:
        nvml.nvmlShutdown()


def _memory(nvml: Any, name: str) -> GpuMemory:
    handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    pids = tuple(process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    return GpuMemory(name=f"GPU {name}", free=memory.free, total=memory.total, pids=pids)
