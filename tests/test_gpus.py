"""How many GPUs a worker asks for, and which ones it sees."""

from __future__ import annotations

import os

import pytest

from aft_ray import gpus
from aft_ray.errors import ConfigError


def test_what_is_set_is_asked_for_and_a_cluster_without_gpus_is_asked_for_none(ray_cluster: None) -> None:
    assert [gpus.num_gpus_of(setting, engine=4) for setting in (None, 0, 0.5, 4)] == [0, 0, 0.5, 4]


def test_a_worker_without_gpus_sees_none_and_the_driver_all_of_its_own(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def seen() -> str | None:
        gpus.take_assigned_gpus()
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert ray.get(ray.remote(seen).remote()) == ""
    assert seen() == "0,1"


def test_gpus_on_a_node_with_the_installation_for_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "has_gpu_build", lambda: False)
    with pytest.raises(ConfigError, match=r"was given 2 GPU.*requirements/gpu\.txt"):
        gpus.check_gpu_build(2)
