"""Two applications on one Serve instance, with the scripted engine: a shared pool, and a split one behind keys.

The shared engine's behaviour is chosen by the width of the request: up to K=3 every sample is fine, K=4 has a sample
that fails, K=6 one that takes five seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import openai
import pytest

from aft_ray.config import ReplicaConfig, ScriptedEngineConfig, ServingConfig, TracesConfig
from aft_ray.engines import Sampling
from aft_ray.inference.plan import Plan
from aft_ray.serving import serve_app, stop
from tests.serving.otlp import Collector, collecting

KEYS_VARIABLE = "AFT_RAY_TEST_KEYS"
SMALL = ReplicaConfig(num_cpus=0.1)
SHORT = Sampling(max_tokens=64)

SHARED = ServingConfig(
    engine=ScriptedEngineConfig(seconds_per_token=0.01, fail_on=(3,), slow_on=(5,), slow_factor=60, calls_tools=True),
    adapters={"sft": "/adapters/sft", "aft": "/adapters/aft"},
    plan=Plan(num_proposals=3, num_layers=1, proposal=SHORT, aggregation=(SHORT,), final=SHORT),
    port=0,
    route_prefix="/shared",
    ingress=SMALL,
    aggregator=SMALL,
    max_num_proposals=8,
    max_num_layers=3,
    max_tokens=100,
    stream_interval_s=0,
)
SPLIT = ServingConfig(
    engine=ScriptedEngineConfig(answers=("written by the aggregator",)),
    proposer_engine=ScriptedEngineConfig(answers=("first draft", "second draft")),
    topology="split",
    plan=Plan(num_proposals=2, num_layers=2),
    port=0,
    route_prefix="/split",
    ingress=SMALL,
    proposer=SMALL,
    aggregator=SMALL,
    api_keys_env=KEYS_VARIABLE,
)


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Return what collects the traces of the split application."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="package")
def served(ray_cluster: None, collector: Collector) -> Iterator[tuple[str, str]]:
    """Return the base URLs of the shared and the split application.

    They end with the last test of this folder, because two idle applications take a third of two cores from other
    tests.
    """
    os.environ[KEYS_VARIABLE] = "key-one, key-two"
    shared = serve_app(SHARED, name="shared")
    split = serve_app(SPLIT.model_copy(update={"traces": TracesConfig(endpoint=collector.url)}), name="split")
    yield shared, split
    stop("split")
    stop("shared")


@pytest.fixture(scope="package")
def base_url(served: tuple[str, str]) -> str:
    return served[0]


@pytest.fixture(scope="package")
def split_url(served: tuple[str, str]) -> str:
    return served[1]


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    """Return the stock client, which only has our base URL."""
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def num_samples_running(served: tuple[str, str]) -> Callable[[], int]:
    """Return how many samples the shared engine is writing now, as its replica reports."""
    from ray import serve

    handle = serve.get_deployment_handle("Aggregator", app_name="shared")
    return lambda: handle.activity.remote().result(timeout_s=10).num_samples
