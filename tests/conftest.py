"""Shared by all tests: one local Ray cluster, one converted SmolLM2. Only the language model is ever replaced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aft_ray.models import let_waiting_threads_sleep

let_waiting_threads_sleep()  # each of pytest's workers has tests that compute on all cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")  # as `aft-ray` sets it for its own clusters
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 a worker starves beside another test's own processes
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network must fail at once


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster with four logical CPUs, whatever the machine has."""
    import ray

    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here}:{here.parent}"  # workers import the workers that tests define
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct as a Hugging Face folder."""
    from aft_ray.models import resolve_model

    return Path(resolve_model("smollm2-135m-instruct"))


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small ChatML tokenizer: what a scripted engine needs for the stages that work on ids."""
    from tests.templates.families import make_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer("chatml").save_pretrained(folder)
    return str(folder)
