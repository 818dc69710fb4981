"""A pool of engines grows by the samples under way, however few requests they belong to, and shrinks again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from aft_ray.config import ReplicaConfig, ScriptedEngineConfig, ServingConfig
from aft_ray.engines import Sampling
from aft_ray.inference.plan import Plan
from aft_ray.serving import serve_app, stop

pytestmark = pytest.mark.soak
APP = "growing"
LONG = Sampling(max_tokens=3000)


@pytest.fixture
def url(ray_cluster: None) -> Iterator[str]:
    small = ReplicaConfig(num_cpus=0.1)
    config = ServingConfig(
        engine=ScriptedEngineConfig(seconds_per_token=0.2, num_tokens=3000),  # longer than any start of a replica
        plan=Plan(num_proposals=8, num_layers=1, proposal=LONG, aggregation=(LONG,), final=LONG),
        port=0,
        route_prefix=f"/{APP}",
        ingress=small,
        aggregator=small.model_copy(
            update={"max_replicas": 3, "target_samples": 6, "upscale_delay_s": 1, "downscale_delay_s": 2}
        ),
    )
    yield serve_app(config, name=APP)
    stop(APP)


def num_replicas() -> int:
    from ray import serve

    return serve.status().applications[APP].deployments["Aggregator"].replica_states.get("RUNNING", 0)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"{num_replicas()} replicas are running"
        time.sleep(0.2)


def test_two_requests_of_eight_samples_need_three_replicas(url: str) -> None:
    with httpx.Client(timeout=120) as client, contextlib.ExitStack() as open_requests:
        assert num_replicas() == 1
        for number in range(2):
            body = {"messages": [{"role": "user", "content": f"question {number}"}], "stream": True}
            reply = open_requests.enter_context(client.stream("POST", f"{url}/v1/chat/completions", json=body))
            assert reply.status_code == 200
        wait_for(lambda: num_replicas() == 3, seconds=180)
    wait_for(lambda: num_replicas() == 1, seconds=90)  # their clients have left
