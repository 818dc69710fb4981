"""What the ledger bills is what the engines have written, however the requests end and wherever the drafts are."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest

from aft_ray.config import ReplicaConfig, ScriptedEngineConfig, ServingConfig
from aft_ray.inference.plan import Plan
from aft_ray.serving import serve_app, stop

pytestmark = pytest.mark.soak
NUM_REQUESTS = 40


@pytest.fixture(params=["shared", "split"])
def served(request: pytest.FixtureRequest, ray_cluster: None, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    topology: Literal["shared", "split"] = request.param
    small = ReplicaConfig(num_cpus=0.1)
    engine = ScriptedEngineConfig(num_tokens=10, seconds_per_token=0.02, slow_on=(3,), slow_factor=10, fail_on=(2,))
    config = ServingConfig(
        engine=engine,
        topology=topology,
        plan=Plan(num_proposals=4, num_layers=2, quorum=2),
        port=0,
        route_prefix=f"/books-{topology}",
        ingress=small,
        aggregator=small,
        proposer=ReplicaConfig() if topology == "shared" else small,
        ledger=str(tmp_path),
    )
    name = f"books-{topology}"
    yield serve_app(config, name=name), name, tmp_path
    stop(name)


def num_written(app: str) -> int:
    from ray import serve

    pools = set(serve.status().applications[app].deployments) - {"Ingress"}
    handles = [serve.get_deployment_handle(pool, app_name=app) for pool in pools]
    return sum(activity.num_tokens for handle in handles for activity in handle.broadcast("activity").results())


def test_every_token_that_an_engine_writes_is_billed_once(served: tuple[str, str, Path]) -> None:
    url, app, folder = served
    rng = random.Random(0)
    plans = [{"draft_deadline_s": 0.4}, {"hedge_s": 1.0}, {"num_layers": 1}, {"num_layers": 0}, {"deadline_s": 0.5}]

    def ask(number: int) -> str:
        patience = rng.uniform(0.05, 0.8) if number % 2 else 60.0
        body: dict[str, Any] = {"messages": [{"role": "user", "content": f"question {number}"}]}
        body |= {"stream": number % 3 == 0, "aft": plans[number % len(plans)]}
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=patience) as reply:
                until = time.monotonic() + patience
                for _ in reply.iter_raw():
                    if time.monotonic() > until:
                        return "left"
            return str(reply.status_code)
        except httpx.ReadTimeout:
            return "left"

    with ThreadPoolExecutor(8) as clients:
        outcomes = list(clients.map(ask, range(NUM_REQUESTS)))
    assert {"200", "left"} <= set(outcomes), outcomes
    # A client may leave before Serve has passed its request on: there is no line for it then, and no token.
    num_answered = sum(outcome != "left" for outcome in outcomes)
    books: list[tuple[int, int, int]] = []
    give_up = time.monotonic() + 60
    while len(books) < 3 or len(set(books[-3:])) > 1 or books[-1][0] < num_answered:  # requests are still ending
        assert time.monotonic() < give_up, f"lines, tokens billed and tokens written: {books}"
        time.sleep(0.7)
        lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
        books.append((len(lines), sum(line["completion_tokens"] for line in lines), num_written(app)))
    num_lines, billed, written = books[-1]
    assert num_lines <= NUM_REQUESTS
    assert billed == written > 0
