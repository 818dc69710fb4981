"""A replica whose engine is dead ends itself; its requests are answered by another one, and Serve replaces it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from aft_ray.config import ReplicaConfig, ScriptedEngineConfig, ServingConfig, VllmEngineConfig
from aft_ray.engines import Sampling
from aft_ray.inference.plan import Plan
from aft_ray.serving import serve_app, stop
from tests.training.tiny import write_model

pytestmark = pytest.mark.soak
SHORT = Sampling(max_tokens=8)
GREEDY = Sampling(temperature=0.0, max_tokens=8)
NUM_REQUESTS = 40


@pytest.fixture(scope="module")
def dying(ray_cluster: None) -> Iterator[str]:
    """Two replicas, each of which dies in the middle of its eleventh request, and so do those that replace them."""
    config = ServingConfig(
        engine=ScriptedEngineConfig(seconds_per_token=0.01, dies_after=10, follows_json_schema=True),
        plan=Plan(num_layers=0, proposal=SHORT, final=SHORT),
        port=0,
        ingress=ReplicaConfig(num_cpus=0.1),
        aggregator=ReplicaConfig(num_cpus=0.1, min_replicas=2, max_replicas=2, max_ongoing_requests=4),
    )
    yield serve_app(config.model_copy(update={"route_prefix": "/dying"}), name="dying")
    stop("dying")


def test_no_request_fails_while_engines_die(dying: str) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("Aggregator", app_name="dying")
    process_ids: set[int] = set()

    def ask(number: int) -> httpx.Response:
        process_ids.add(handle.activity.remote().result(timeout_s=60).process_id)
        body = {"messages": [{"role": "user", "content": f"question {number}"}]}
        return httpx.post(f"{dying}/v1/chat/completions", json=body, timeout=120)

    with ThreadPoolExecutor(2) as clients:
        responses = list(clients.map(ask, range(NUM_REQUESTS)))
    assert [response.status_code for response in responses] == [200] * NUM_REQUESTS
    assert all(response.json()["choices"][0]["message"]["content"] for response in responses)
    assert len(process_ids) > 2, "each engine answers ten requests, so the forty were answered by at least four"
    wait_for_replicas("dying", 2)


def test_a_request_with_a_schema_is_not_sent_to_a_second_replica(dying: str) -> None:
    """What killed one replica could kill the next."""
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "array"}}}
    found = []
    while 502 not in found and len(found) < 40:
        body = {"messages": [{"role": "user", "content": "list"}], "response_format": schema}
        found.append(httpx.post(f"{dying}/v1/chat/completions", json=body, timeout=120).status_code)
    assert 502 in found, "asked of another replica, it would have been answered"
    assert set(found) <= {200, 502}


def wait_for_replicas(app: str, number: int) -> None:
    from ray import serve

    give_up = time.monotonic() + 120
    while dict(serve.status().applications[app].deployments["Aggregator"].replica_states) != {"RUNNING": number}:
        assert time.monotonic() < give_up, "Serve has not replaced the replicas"
        time.sleep(0.2)


@pytest.fixture
def two_vllm_replicas(ray_cluster: None, tmp_path: Path) -> Iterator[str]:
    config = ServingConfig(
        engine=VllmEngineConfig(
            model=str(write_model(tmp_path, hidden_size=128)),  # heads that vLLM has a CPU kernel for
            max_model_len=128,
            dtype="float32",
            max_num_seqs=8,
            max_lora_rank=0,
        ),
        plan=Plan(num_layers=0, proposal=GREEDY, final=GREEDY),
        port=0,
        ingress=ReplicaConfig(num_cpus=0.1),
        aggregator=ReplicaConfig(num_cpus=0.5, min_replicas=2, max_replicas=2, max_ongoing_requests=4),
    )
    yield serve_app(config.model_copy(update={"route_prefix": "/cores"}), name="cores")
    stop("cores")


@pytest.mark.model
def test_no_request_fails_while_the_core_of_a_vllm_engine_is_killed(two_vllm_replicas: str) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("Aggregator", app_name="cores")
    wait_for_replicas("cores", 2)
    body = {"messages": [{"role": "user", "content": "the old green river near a small town"}]}
    deadline = time.monotonic() + 60

    def keep_asking(_: int) -> list[httpx.Response]:
        found = []
        while time.monotonic() < deadline:
            found.append(httpx.post(f"{two_vllm_replicas}/v1/chat/completions", json=body, timeout=120))
        return found

    with ThreadPoolExecutor(4) as clients:
        responses = clients.map(keep_asking, range(4))
        time.sleep(5)
        replica = psutil.Process(handle.activity.remote().result(timeout_s=60).process_id)
        (core,) = [child for child in replica.children(recursive=True) if "EngineCore" in child.name()]
        core.kill()
        replica.wait(timeout=20)
        wait_for_replicas("cores", 2)
        answers = [response for found in responses for response in found]
    assert len(answers) > 20
    assert [response.text for response in answers if response.status_code != 200] == []
