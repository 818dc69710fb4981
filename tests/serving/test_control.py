"""Two ingress replicas over real HTTP share keys, limits, adapters, draining and the ledger."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from aft_ray.config import AdmissionConfig, ReplicaConfig, ScriptedEngineConfig, ServingConfig
from aft_ray.engines import Sampling
from aft_ray.inference.plan import Plan
from aft_ray.serving import serve_app, stop

SHORT = Sampling(max_tokens=16)
BODY: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Name three rivers."}]}
SLOW: dict[str, Any] = BODY | {"aft": {"num_proposals": 6}}
"""Sample 5 takes four seconds."""


@dataclass(frozen=True)
class Server:
    url: str
    folder: Path

    def post(self, body: dict[str, Any] = BODY, key: str = "bob", path: str = "/v1/chat/completions") -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60)

    def get(self, path: str, key: str = "ops") -> Any:
        return httpx.get(self.url + path, headers={"authorization": f"Bearer {key}"}, timeout=60).json()

    def ledger(self) -> list[dict[str, Any]]:
        """Return every line, the oldest first."""
        files = (self.folder / "ledger").glob("*.jsonl")
        return sorted((json.loads(line) for f in files for line in f.read_text().splitlines()), key=lambda e: e["time"])

    def write_keys(self, **more: dict[str, Any]) -> None:
        keys = {"alice": {"max_requests": 1}, "bob": {}, "ops": {"admin": True}, **more}
        hashed = {name: {"sha256": hashlib.sha256(name.encode()).hexdigest(), **own} for name, own in keys.items()}
        (self.folder / "keys.yaml").write_text(yaml.safe_dump(hashed))

    def adapter(self, weights: str, name: str = "made") -> Path:
        """Make a folder that looks like an adapter, which is enough for the scripted engine."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_text(weights)
        return folder


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("control")
    server = Server("", folder)
    server.write_keys()
    (folder / "watched").mkdir()
    config = ServingConfig(
        engine=ScriptedEngineConfig(seconds_per_token=0.01, slow_on=(5,), slow_factor=50, fail_on=(6,)),
        adapters={"aft": str(server.adapter("first", "first"))},
        default_model="base",
        plan=Plan(num_proposals=2, num_layers=1, proposal=SHORT, aggregation=(SHORT,), final=SHORT),
        port=0,
        route_prefix="/guarded",
        ingress=ReplicaConfig(num_cpus=0.1, min_replicas=2, max_replicas=2),
        aggregator=ReplicaConfig(num_cpus=0.1),
        keys_file=str(folder / "keys.yaml"),
        admission=AdmissionConfig(max_requests=6, max_tokens=10_000),
        adapters_dir=str(folder / "watched"),
        ledger=str(folder / "ledger"),
    )
    url = serve_app(config, name="guarded")
    yield Server(url, folder)
    stop("guarded")


class Holder:
    """Holds its CPUs, for which replicas wait."""

    def ready(self) -> None:
        """Return when the actor runs."""


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"still not true after {timeout_s} s"
        time.sleep(0.05)


def ask_together(server: Server, number: int, body: dict[str, Any], key: str = "bob") -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, headers={"authorization": f"Bearer {key}"}) as client:
            posts = (client.post(f"{server.url}/v1/chat/completions", json=body) for _ in range(number))
            return await asyncio.gather(*posts)

    return asyncio.run(ask())


# ── keys and limits ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_of_the_file_is_accepted_and_no_other(server: Server) -> None:
    assert server.post(key="bob").status_code == 200
    assert server.post(key="nobody").status_code == 401


def test_a_key_can_be_added_and_revoked_while_the_server_runs(server: Server) -> None:
    server.write_keys(carol={})
    wait_for(lambda: [server.post(key="carol").status_code for _ in range(4)] == [200] * 4)
    server.write_keys()
    wait_for(lambda: [server.post(key="carol").status_code for _ in range(4)] == [401] * 4)


def test_a_file_that_cannot_be_read_leaves_the_keys_as_they_were(server: Server) -> None:
    (server.folder / "keys.yaml").write_text("bob: [not, a, key]")
    time.sleep(1.5)
    assert server.post(key="bob").status_code == 200
    server.write_keys()


def test_a_keys_limit_holds_over_both_ingress_replicas(server: Server) -> None:
    statuses = [response.status_code for response in ask_together(server, 6, SLOW, key="alice")]
    assert sorted(statuses) == [200, 429, 429, 429, 429, 429]


def test_the_servers_limit_holds_over_both_ingress_replicas_and_says_when_to_come_again(server: Server) -> None:
    responses = ask_together(server, 16, SLOW)
    refused = [response for response in responses if response.status_code == 429]
    assert len(refused) == 10
    assert {response.json()["error"]["code"] for response in refused} == {"rate_limit_exceeded"}
    assert all(1 <= int(response.headers["retry-after"]) <= 60 for response in refused)
    assert server.get("/admin/status")["num_requests"] == 0
    assert server.post().status_code == 200


def test_the_clients_own_error_class_is_raised(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="bob", max_retries=0) as client:
        plan = {"num_proposals": 16, "proposal": {"max_tokens": 1000}}
        with pytest.raises(
            openai.BadRequestError,
            match=r"may cost 32\d\d\d tokens, more than the limit of 10000 tokens of concurrent requests",
        ):
            client.chat.completions.create(**BODY, extra_body={"aft": plan})


def test_limits_outlive_the_actor_that_keeps_them(server: Server) -> None:
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    [control] = [actor for actor in named if "control" in actor["name"] and "guarded" in actor["name"]]
    ray.kill(ray.get_actor(control["name"], namespace=control["namespace"]))
    statuses = [response.status_code for response in ask_together(server, 16, SLOW)]
    assert sorted(statuses) == [200] * 6 + [429] * 10
    assert server.get("/admin/status")["num_requests"] == 0


@pytest.mark.soak
def test_a_control_actor_that_dies_while_the_application_starts_is_replaced(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    def control() -> list[Any]:
        named = ray.util.list_named_actors(all_namespaces=True)
        return [
            ray.get_actor(one["name"], namespace=one["namespace"])
            for one in named
            if "control" in one["name"] and "late" in one["name"]
        ]

    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.ready.remote())
    config = ServingConfig(
        engine=ScriptedEngineConfig(),
        port=0,
        route_prefix="/late",
        ingress=ReplicaConfig(num_cpus=0.1),
        aggregator=ReplicaConfig(num_cpus=2.5),
    )
    with ThreadPoolExecutor(1) as starter:
        url = starter.submit(serve_app, config, name="late")
        wait_for(lambda: len(control()) == 1, 60)
        [first] = control()
        ray.get(first.__ray_ready__.remote())
        ray.kill(first)
        wait_for(lambda: [one._actor_id for one in control()] not in ([], [first._actor_id]), 90)
        ray.kill(holder)
        assert httpx.post(f"{url.result(120)}/v1/chat/completions", json=BODY, timeout=60).status_code == 200
    stop("late")


# ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answered_request_is_written_down_with_its_tokens_and_without_its_words(server: Server) -> None:
    reply = server.post(BODY | {"model": "aft@k3-l2"}).json()
    wait_for(lambda: any(entry["id"] == reply["id"] for entry in server.ledger()))
    [entry] = [entry for entry in server.ledger() if entry["id"] == reply["id"]]
    assert (entry["key"], entry["model"], entry["plan"], entry["status"]) == ("bob", "aft", "k3-l2", "answered")
    assert entry["completion_tokens"] == reply["usage"]["completion_tokens"] == 7 * 8
    assert entry["prompt_tokens"] == reply["usage"]["prompt_tokens"]
    assert [layer["layer"] for layer in entry["layers"]] == [0, 1, 2]
    assert "rivers" not in json.dumps(server.ledger())


def test_a_failed_request_is_written_down_with_its_code(server: Server) -> None:
    before = len(server.ledger())
    assert server.post(BODY | {"aft": {"num_proposals": 7, "quorum": 7}}).status_code == 503
    wait_for(lambda: len(server.ledger()) == before + 1)
    entry = server.ledger()[-1]
    assert (entry["status"], entry["error"]) == ("failed", "quorum_not_met")
    assert entry["completion_tokens"] == 6 * 8


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_a_client_that_leaves_is_written_down_with_what_was_written_for_it(server: Server, stream: bool) -> None:
    before = len(server.ledger())
    with pytest.raises(httpx.ReadTimeout), httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=SLOW | {"stream": stream},
        headers={"authorization": "Bearer bob"}, timeout=1.5,
    ) as response:  # fmt: skip
        for line in response.iter_lines():
            assert "delta" in line or not line
    left = time.monotonic()
    wait_for(lambda: server.get("/admin/status")["num_requests"] == 0)
    assert time.monotonic() - left < 3  # left alone it takes four seconds in all, and was left after 1.5
    wait_for(lambda: len(server.ledger()) == before + 1)
    entry = server.ledger()[-1]
    assert (entry["status"], entry["layers"][0]["num_answers"], entry["layers"][0]["num_cancelled"]) == (
        "cancelled", 5, 1,
    )  # fmt: skip
    assert 5 * 8 < entry["completion_tokens"] < 6 * 8


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text_of(server: Server, **changes: Any) -> str:
    return str(server.post(BODY | {"model": "aft", "seed": 1} | changes).json()["choices"][0]["message"]["content"])


def test_only_an_admin_key_may_move_a_name(server: Server) -> None:
    body = {"name": "aft", "path": str(server.adapter("second"))}
    assert server.post(body, key="bob", path="/admin/adapters").json()["error"]["code"] == "admin_key_required"
    assert server.post(body, key="nobody", path="/admin/adapters").status_code == 401


@pytest.mark.parametrize(("name", "message"), [("base", "cannot name an adapter"), ("a/b", "cannot name an adapter")])
def test_a_name_that_cannot_be_one_is_refused(server: Server, name: str, message: str) -> None:
    response = server.post({"name": name, "path": "/nowhere"}, key="ops", path="/admin/adapters")
    assert (response.status_code, message in response.json()["error"]["message"]) == (400, True)


def test_a_folder_without_an_adapter_is_refused_and_nothing_moves(server: Server) -> None:
    before = server.get("/admin/adapters")
    response = server.post({"name": "aft", "path": str(server.folder)}, key="ops", path="/admin/adapters")
    assert "found no adapter" in response.json()["error"]["message"]
    assert server.get("/admin/adapters") == before


def test_a_name_moves_at_once_everywhere_while_requests_go_on_and_none_is_dropped(server: Server) -> None:
    """Requests that began before the move keep their adapter to the end; later ones get the new adapter."""
    outcomes: list[tuple[float, int, str]] = []

    async def keep_asking(client: httpx.AsyncClient, until: asyncio.Event) -> None:
        while not until.is_set():
            began = time.monotonic()
            response = await client.post(
                f"{server.url}/v1/chat/completions", json=BODY | {"model": "aft@single", "seed": 1}
            )
            outcomes.append((began, response.status_code, response.text))

    async def move() -> tuple[float, float]:
        until = asyncio.Event()
        async with httpx.AsyncClient(timeout=60, headers={"authorization": "Bearer ops"}) as client:
            asking = [asyncio.create_task(keep_asking(client, until)) for _ in range(4)]
            await asyncio.sleep(1)
            posted = time.monotonic()
            body = {"name": "aft", "path": str(server.adapter("second"))}
            response = await client.post(f"{server.url}/admin/adapters", json=body)
            assert response.status_code == 200, response.text
            moved = time.monotonic()
            await asyncio.sleep(1)
            until.set()
            await asyncio.gather(*asking)
        return posted, moved

    posted, moved = asyncio.run(move())
    assert {status for _, status, _ in outcomes} == {200}
    texts = {
        when: {json.loads(text)["choices"][0]["message"]["content"] for began, _, text in outcomes if is_in(began)}
        for when, is_in in {"before": lambda t: t < posted - 0.5, "after": lambda t: t > moved}.items()
    }
    assert (len(texts["before"]), len(texts["after"])) == (1, 1)
    assert texts["before"] != texts["after"]


def test_new_content_in_the_same_folder_is_a_new_version(server: Server) -> None:
    """What an engine caches by folder can never be stale, because every version has its own folder."""
    moves = [
        server.post({"name": "again", "path": str(server.adapter(text))}, key="ops", path="/admin/adapters").json()
        for text in ("one", "two", "one")
    ]
    versions = [move["version"] for move in moves]
    assert versions[0] == versions[2] != versions[1]
    assert Path(moves[1]["path"], "adapter_model.safetensors").read_text() == "two"
    first, second = (text_of(server, model="again"), text_of(server, model="aft"))
    assert first != second


def test_every_ingress_replica_knows_a_name_as_soon_as_one_has_moved_it(server: Server) -> None:
    headers = {"authorization": "Bearer ops"}
    for number in range(5):  # whichever replica each of these meets
        body = {"name": "again", "path": str(server.adapter(f"fresh {number}"))}
        version = server.post(body, key="ops", path="/admin/adapters").json()["version"]
        assert [server.post(BODY | {"model": "again"}).status_code for _ in range(3)] == [200] * 3
        assert server.post(body, key="ops", path="/admin/adapters").json()["version"] == version
        assert httpx.delete(f"{server.url}/admin/adapters/again", headers=headers, timeout=60).status_code == 200
        assert [server.post(BODY | {"model": "again"}).status_code for _ in range(3)] == [404] * 3


def test_an_adapter_that_appears_in_the_watched_folder_is_served_and_can_be_removed(server: Server) -> None:
    server.adapter("watched", "watched/dropped-in")
    wait_for(lambda: "dropped-in" in [model["id"] for model in server.get("/v1/models")["data"]], 30)
    assert server.post(BODY | {"model": "dropped-in@k2-l1"}).status_code == 200
    headers = {"authorization": "Bearer ops"}
    assert httpx.delete(f"{server.url}/admin/adapters/dropped-in", headers=headers, timeout=60).status_code == 200
    assert {server.post(BODY | {"model": "dropped-in"}).status_code for _ in range(4)} == {404}


@pytest.mark.soak
def test_the_watched_folder_is_served_whichever_ingress_replica_dies(server: Server) -> None:
    import ray

    def replicas() -> dict[str, dict[str, str]]:
        named = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"]: actor for actor in named if "SERVE_REPLICA::guarded#Ingress" in actor["name"]}

    first = replicas()
    assert len(first) == 2
    for number, actor in enumerate(first.values()):  # one of the two was watching
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
        server.adapter(f"after death {number}", f"watched/after-death-{number}")
        wait_for(lambda name=f"after-death-{number}": server.post(BODY | {"model": name}).status_code == 200, 60)
        wait_for(lambda: len(replicas()) == 2, 60)


# ── draining ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draining_server_finishes_its_requests_and_refuses_new_ones(server: Server) -> None:
    async def drain() -> tuple[httpx.Response, httpx.Response, list[int]]:
        async with httpx.AsyncClient(timeout=60, headers={"authorization": "Bearer ops"}) as client:
            begun = asyncio.create_task(client.post(f"{server.url}/v1/chat/completions", json=SLOW))
            await asyncio.sleep(1)
            await client.post(f"{server.url}/admin/drain", json={})
            late = await client.post(f"{server.url}/v1/chat/completions", json=BODY)
            await asyncio.sleep(1.5)  # every replica has heard of it
            ready = [(await client.get(f"{server.url}/ready")).status_code for _ in range(4)]
            return await begun, late, ready

    begun, late, ready = asyncio.run(drain())
    assert begun.status_code == 200
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert int(late.headers["retry-after"]) > 0
    assert ready == [503] * 4
    assert server.post({"drain": False}, key="ops", path="/admin/drain").json()["num_requests"] == 0
    wait_for(lambda: [httpx.get(f"{server.url}/ready", timeout=60).status_code for _ in range(4)] == [200] * 4)
