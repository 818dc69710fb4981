"""GPUs: how many a worker asks the cluster for, and that it sees no others.

    num_gpus_of(None, engine=4)      4 on a cluster with GPUs, 0 without
    num_gpus_of(0.5, engine=1)       0.5: what is set is asked for

A worker that asks for none still sees all GPUs of its node, since Ray no longer hides them (ray#54868), and would take
the first one beside whoever was given it.
"""

from __future__ import annotations

import os

from aft_ray.errors import ConfigError


def num_gpus_of(setting: float | None, engine: int) -> float:
    """Return the GPUs that a worker asks for: the setting, else what its engine uses where there are GPUs."""
    if setting is not None:
        return setting
    return float(engine) if engine and cluster_has_gpus() else 0.0


def cluster_has_gpus() -> bool:
    """Return whether the connected Ray cluster has, or can start, nodes with GPUs that this installation can use."""
    import ray

    if not has_gpu_build() or not ray.is_initialized():
        return False
    from aft_ray.cluster_fit import AUTOSCALING, node_types

    resources = ray.cluster_resources()
    if resources.get("GPU"):
        return True
    types = node_types()
    if types is None:  # nodes of unknown kinds can be added, or none
        return AUTOSCALING in resources
    return any(kind.resources.get("GPU") or not kind.resources for kind in types)


def has_gpu_build() -> bool:
    """Return whether the installed torch can compute on GPUs (requirements/gpu.txt, not cpu.txt)."""
    import torch

    return torch.version.cuda is not None or torch.version.hip is not None


def take_assigned_gpus() -> None:
    """Let this process see the GPUs that Ray gave to its worker, and no others. Call it before CUDA starts.

    Raises ConfigError for GPUs that the installation cannot use. Outside a Ray worker it does nothing.
    """
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return
    num_gpus = len(ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))
    if num_gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        check_gpu_build(num_gpus)


def check_gpu_build(num_gpus: float) -> None:
    """Raise ConfigError where a worker has GPUs and its node has the installation for CPUs."""
    if not has_gpu_build():
        import torch

        raise ConfigError(
            f"this worker was given {num_gpus:g} GPU, but its node has the installation for CPUs (torch "
            f"{torch.__version__}), which cannot use one. Install requirements/gpu.txt there (make setup DEVICE=gpu), "
            "or ask for no GPUs"
        )
