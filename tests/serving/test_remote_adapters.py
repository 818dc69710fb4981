"""Adapters on object storage and of the hub, served by two nodes with a cache of their own each."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from aft_ray.config import ScriptedEngineConfig, ServingConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.errors import ConfigError
from aft_ray.serving import adapters, build_app, content_named
from aft_ray.serving.adapters import CONFIG, VERSIONS, WEIGHTS, keep_version, version_of
from aft_ray.serving.limits.admission import Table
from aft_ray.serving.service import Service
from aft_ray.storage import Folder, local_copy
from tests.hub import put_in_cache
from tests.serving.test_adapter_swap import ADMIN, Truth, ask, write_adapter
from tests.serving.test_ingress import over_http, service_over
from tests.training.tiny import write_model

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40
KEYS = yaml.safe_dump({"ops": {"sha256": hashlib.sha256(b"ops").hexdigest(), "admin": True}})
SERVE = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from aft_ray.config import ServingConfig, validate
from aft_ray.serving import serve_app, stop

config, *caches = sys.argv[1:]
cluster = Cluster()
for cache in caches:
    small = dict(num_cpus=3, object_store_memory=80_000_000)
    cluster.add_node(env_vars={"AFT_RAY_CACHE": cache}, **small)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
cluster.wait_for_nodes()
print("SERVING", serve_app(validate(ServingConfig, json.loads(open(config).read()), origin="test")), flush=True)
sys.stdin.read()
stop()
ray.shutdown()
cluster.shutdown()
"""


@dataclass(frozen=True)
class Server:
    url: str
    bucket: str
    folder: Path
    truth: Truth
    caches: tuple[Path, Path]

    def write(self, name: str, seed: int) -> Path:
        """Write an adapter on this machine."""
        return write_adapter(self.folder / f"{name}-{seed}", self.truth.model, seed)

    def upload(self, place: str, adapter: Path) -> str:
        """Put an adapter into the bucket, and return its URL."""
        for file in (WEIGHTS[0], CONFIG):
            Folder.at(f"{self.bucket}/{place}").write_bytes(file, (adapter / file).read_bytes())
        return f"{self.bucket}/{place}"

    def move(self, name: str, path: str) -> httpx.Response:
        body = {"name": name, "path": path}
        return httpx.post(f"{self.url}/admin/adapters", json=body, headers=ADMIN, timeout=180)

    def names(self) -> list[str]:
        found = httpx.get(f"{self.url}/v1/models", headers=ADMIN, timeout=60).json()
        return [model["id"] for model in found["data"]]


@pytest.fixture(scope="module")
def server(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("remote")
    truth = Truth(write_model(folder / "model"))
    caches = (folder / "one", folder / "two")
    made = Server("", bucket, folder, truth, caches)
    made.upload("configured", made.write("configured", 1))
    put_in_cache(folder / "hub", "owner/lora", made.write("pinned", 2), COMMIT, "v1")
    (folder / "keys.yaml").write_text(KEYS)
    greedy = {"temperature": 0.0, "max_tokens": 12}
    config = {
        "engine": {"type": "transformers", "model": str(truth.model), "max_model_len": 128, "dtype": "float32"},
        "adapters": {"configured": f"{bucket}/configured", "pinned": "owner/lora#v1"},
        "adapters_dir": f"{bucket}/watched",
        "default_model": "base",
        "plan": {"num_layers": 0, "proposal": greedy, "final": greedy},
        "port": 0,
        "ingress": {"num_cpus": 0.1},
        "aggregator": {"num_cpus": 2, "min_replicas": 2, "max_replicas": 2},
        "keys_file": str(folder / "keys.yaml"),
    }
    (folder / "serving.json").write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SERVE, str(folder / "serving.json"), *map(str, caches)]
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
    )
    assert process.stdout is not None
    line = next((line for line in process.stdout if line.startswith("SERVING ")), None)
    assert line is not None, (folder / "log.txt").read_text()[-4000:]
    yield Server(line.split()[1], bucket, folder, truth, caches)
    process.communicate("", timeout=120)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"still not true after {timeout_s} s"
        time.sleep(0.2)


@pytest.mark.soak
def test_a_name_moves_to_a_url_and_every_replica_fetches_it_to_its_own_node(server: Server) -> None:
    first, second = server.write("first", 3), server.write("second", 4)
    by_first, by_second = server.truth.answer(first), server.truth.answer(second)
    assert by_first != by_second
    url = server.upload("run/model/aft", first)
    for adapter, answer in ((first, by_first), (second, by_second)):
        server.upload("run/model/aft", adapter)
        moved = server.move("aft", url).json()
        version = version_of(adapter)
        assert (moved["version"], moved["path"]) == (version, f"{server.bucket}/watched/{VERSIONS}/{version}")

        def is_everywhere(version: str = version, answer: str = answer) -> bool:
            assert ask(server.url, "aft") == answer
            return all(list(cache.glob(f"copies/{version}-*")) for cache in server.caches)

        wait_for(is_everywhere)
    server.upload("run/model/aft", first)
    assert ask(server.url, "aft") == by_second, "what lies at the URL since then has not been moved in"


@pytest.mark.soak
def test_a_config_names_adapters_by_url_and_by_revision(server: Server) -> None:
    assert ask(server.url, "configured") == server.truth.answer(server.write("configured", 1))
    assert ask(server.url, "pinned") == server.truth.answer(server.write("pinned", 2))


@pytest.mark.soak
def test_a_name_moves_to_a_commit_of_the_hub(server: Server) -> None:
    moved = server.move("hub", "owner/lora#v1").json()
    expected = server.write("pinned", 2)
    assert (moved["version"], moved["path"]) == (version_of(expected), f"owner/lora#{COMMIT}")
    assert ask(server.url, "hub") == server.truth.answer(expected)


@pytest.mark.soak
def test_a_watched_folder_on_object_storage(server: Server) -> None:
    first, second = server.write("watched", 5), server.write("watched", 6)
    for adapter in (first, second):
        server.upload("watched/dropped-in", adapter)
        answer = server.truth.answer(adapter)
        wait_for(lambda answer=answer: "dropped-in" in server.names() and ask(server.url, "dropped-in") == answer)
    for file in (WEIGHTS[0], CONFIG):
        Folder.at(f"{server.bucket}/watched/dropped-in").remove(file)
    wait_for(lambda: "dropped-in" not in server.names())


# ── without Serve ────────────────────────────────────────────────────────────────────────────────────────────────────


def put(place: str, weights: bytes) -> str:
    Folder.at(place).write_bytes(CONFIG, b"{}")
    Folder.at(place).write_bytes(WEIGHTS[0], weights)
    return place


@pytest.fixture
def alone(tmp_path: Path) -> Service:
    """A server in this process whose engine takes any adapter."""
    (tmp_path / "keys.yaml").write_text(KEYS)
    return service_over(ScriptedEngine(ScriptedEngineConfig()), keys_file=str(tmp_path / "keys.yaml"))


def move(service: Service, path: str) -> httpx.Response:
    body = {"name": "aft", "path": path}
    return over_http(service, lambda client: client.post("/admin/adapters", json=body, headers=ADMIN))


def test_a_url_is_copied_beside_itself_under_a_name_of_its_content(bucket: str, alone: Service) -> None:
    versions = f"{bucket}/beside/{VERSIONS}"
    found = [move(alone, put(f"{bucket}/beside/aft", weights)).json() for weights in (b"one", b"other", b"one")]
    assert found[0]["version"] == found[2]["version"] != found[1]["version"]
    assert [one["path"] for one in found] == [f"{versions}/{one['version']}" for one in found]
    assert Folder.at(found[1]["path"]).read_bytes(WEIGHTS[0]) == b"other"
    again = move(alone, found[1]["path"]).json()
    assert again["path"] == found[1]["path"], "a version is not copied again"


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("{bucket}/nothing", "invalid_value", "found no adapter"),
        ("s3://no-such-bucket/aft", "invalid_value", "found no adapter"),
        ("ftp://host/aft", "invalid_value", "unknown scheme ftp://"),
        ("s3:/one/slash", "invalid_value", "a URL has two slashes"),
        ("owner/nothing#v1", "adapter_storage_error", "owner/nothing#v1: no such folder here"),
        ("/dev/null", "adapter_storage_error", "/dev/null: cannot be listed"),
        ("a\0b", "invalid_value", "path: string should match pattern"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason_and_nothing_moves(
    bucket: str, alone: Service, path: str, code: str, words: str
) -> None:
    response = move(alone, path.format(bucket=bucket))
    error = response.json()["error"]
    assert (response.status_code, error["code"], words in error["message"]) == (400, code, True), error
    assert not alone.gate.table.adapters


def test_adapters_of_a_config_are_served_as_the_versions_that_they_are(bucket: str, tmp_path: Path) -> None:
    here, there = put(str(tmp_path / "here"), b"some"), put(f"{bucket}/config/there", b"some")
    named = {"here": here, "there": there, "none": str(tmp_path / "none")}
    config = content_named(ServingConfig(engine=ScriptedEngineConfig(), adapters=named))
    assert config.adapters is not None
    version = version_of(Path(here))
    assert config.adapters["here"] == str(tmp_path / VERSIONS / version)
    assert config.adapters["there"] == f"{bucket}/config/{VERSIONS}/{version}"
    assert config.adapters["none"] == named["none"], "replicas say what is wrong with it"
    table = Table.configured(config.adapters)
    assert [one.version for one in table.adapters.values()] == [version, version, "configured"]
    assert content_named(config) == config


def test_an_adapter_that_changes_while_it_is_fetched_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = put(f"{bucket}/changing/aft", b"some")

    def fetched_late(location: str) -> Path:
        copy = local_copy(location)
        Folder.at(location).write_bytes(WEIGHTS[0], b"other weights")
        return copy

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(adapters, "local_copy", fetched_late)
        with pytest.raises(ConfigError, match="changed while it was copied"):
            keep_version(place)
    kept = keep_version(place)
    assert Folder.at(f"{bucket}/changing/{VERSIONS}").folder_names() == [kept.version]
    assert Folder.at(kept.path).read_bytes(WEIGHTS[0]) == b"other weights"


def test_an_adapter_goes_between_a_folder_and_object_storage(bucket: str, tmp_path: Path) -> None:
    here = keep_version(put(f"{bucket}/down/aft", b"some"), Folder.at(tmp_path / "store"))
    assert Path(here.path) == tmp_path / "store" / here.version and version_of(Path(here.path)) == here.version
    there = keep_version(here.path, Folder.at(f"{bucket}/up"))
    assert (there.version, there.path) == (here.version, f"{bucket}/up/{here.version}")
    assert version_of(local_copy(there.path)) == here.version


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapters_dir": "ftp://host/x"}, r"serving\.adapters_dir: ftp://host/x: unknown scheme"),
        ({"adapters_dir": "s3://b/x", "keep_adapter_versions": 2}, r"serving\.keep_adapter_versions 2: versions are"),
    ],
)
def test_a_place_of_adapters_that_cannot_be_watched_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_app({"engine": {"type": "scripted"}, **settings})
