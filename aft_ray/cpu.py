"""What this machine's CPU computes fast, and how its threads wait for each other."""

from __future__ import annotations

import os


def cpu_has_bfloat16() -> bool:
    """Return whether this machine's CPU has instructions that multiply bfloat16 matrices.

    On x86 they are AVX512_BF16 or AMX. With AVX-512 alone, torch says that bfloat16 is supported and converts every
    number: SmolLM2-135M reads prompts 2.9 times as fast in float32, and trains 2.5 times as fast. With AVX2 alone it
    multiplies number by number, and a training step takes 14 times as long.
    """
    import torch

    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # absent where torch has no oneDNN
    instructions = torch.cpu.get_capabilities()
    return bool(probe and probe()) and any(instructions.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def dtype_to_load(stated: str, device: str) -> str:
    """Return the dtype that a setting means on `device` ("cpu", "cuda").

    `auto` stays `auto`, the dtype the model was saved in, except on a CPU without bfloat16, where it is float32.
    """
    return "float32" if stated == "auto" and device == "cpu" and not cpu_has_bfloat16() else stated


def let_waiting_threads_sleep() -> None:
    """Make OpenMP threads of processes started from now on sleep, after some microseconds, while they wait.

    By default they spin for milliseconds at the end of every operation, on the core that the thread they wait for needs
    as soon as anything else runs on the machine. SmolLM2 on vLLM with two cores beside one busy process decodes 5.6
    tokens/s while they spin and 12.3 while they sleep; alone, 22 and 26. Settings of the user's own are kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # 0 would let vLLM's core process, which polls, take the cores
