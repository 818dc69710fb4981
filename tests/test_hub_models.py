"""A model that the hub does not give is named before anything starts; a hub that does not answer refuses nothing.

A reference with a revision is loaded at that revision, tokenizer and weights alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aft_ray.config import TransformersEngineConfig
from aft_ray.errors import ConfigError, StorageError
from aft_ray.hub import HubCommit, is_hub_id, origin
from aft_ray.models import fetched_bytes, has_chat_template, resolve_adapter, resolve_model, resolve_tokenizer
from aft_ray.training.identity import model_identity
from tests.hub import put_in_cache
from tests.training.tiny import write_model

REPLIES = {
    "owner/missing": (401, "RepoNotFound"),
    "owner/gated": (403, "GatedRepo"),
    "owner/gguf": (404, "EntryNotFound"),
    "owner/there": (200, ""),
    "owner/there#v9": (404, "RevisionNotFound"),
}


class Hub(BaseHTTPRequestHandler):
    """The hub's replies to requests for `config.json`."""

    def do_HEAD(self) -> None:
        owner, name, _, revision = self.path.split("/")[1:5]
        model = f"{owner}/{name}" + (f"#{revision}" if revision != "main" else "")
        status, code = REPLIES.get(model, (404, "RepoNotFound"))
        self.send_response(status)
        headers = {"X-Error-Code": code} if code else {"ETag": '"1"', "X-Repo-Commit": "0" * 40}
        for name, value in {**headers, "Content-Length": "2"}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def refusals(url: str, cache: Path) -> dict[str, str | None]:
    """What `hub_refusal` says in a process that knows this hub: the library reads its address when it is imported."""
    code = "import json, sys; from aft_ray.models import hub_refusal\n"
    code += "print(json.dumps({model: hub_refusal(model) for model in sys.argv[1:]}))"
    settings = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *REPLIES],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def test_only_what_the_hub_refuses_is_refused(hub: str, tmp_path: Path) -> None:
    found = refusals(hub, tmp_path)
    assert "no such model" in str(found["owner/missing"])
    assert "licence must be accepted" in str(found["owner/gated"])
    assert found["owner/gguf"] == "it has no config.json"
    assert found["owner/there"] is None
    assert found["owner/there#v9"] == "the hub has no revision v9 of it"
    assert set(refusals("http://127.0.0.1:9", tmp_path / "empty").values()) == {None}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with two revisions of a model, whose tokenizers differ."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for eos, commit, revision in (("<|im_end|>", "a" * 40, "main"), ("<|endoftext|>", "b" * 40, "v1")):
        model = write_model(tmp_path / revision, eos=eos)
        put_in_cache(tmp_path / "hub", "owner/tiny", model, commit, revision)
    return tmp_path / "hub"


def test_a_revision_is_one_folder_for_tokenizer_settings_and_weights(cache: Path) -> None:
    from aft_ray.engines.transformers import TransformersEngine

    pinned = str(cache / "models--owner--tiny" / "snapshots" / ("b" * 40))
    assert resolve_model("owner/tiny#v1") == resolve_model(f"owner/tiny#{'b' * 40}") == pinned
    assert resolve_model("owner/tiny#v1", weights=False) == resolve_tokenizer("owner/tiny#v1") == pinned
    assert resolve_model("owner/tiny") == "owner/tiny"
    assert has_chat_template("owner/tiny#v1")
    assert model_identity(pinned) == {"id": "owner/tiny", "revision": "b" * 40}
    engine = TransformersEngine(TransformersEngineConfig(model="owner/tiny#v1"))
    assert engine.tokenizer.eos_token == "<|endoftext|>"
    assert engine.model.config.vocab_size == len(engine.tokenizer)


def test_a_revision_that_is_nowhere_is_refused_by_name(cache: Path) -> None:
    with pytest.raises(StorageError, match="owner/tiny#v2: no such folder here"):
        resolve_model("owner/tiny#v2")
    with pytest.raises(ConfigError, match=r"adapter \./no/such/adapter: no such folder"):
        resolve_adapter("./no/such/adapter")


def test_the_origin_of_a_folder_is_told_from_its_place_in_the_cache(tmp_path: Path) -> None:
    found = origin(f"/root/.cache/huggingface/hub/models--owner--a-model.v2/snapshots/{'c' * 40}")
    assert found == HubCommit(id="owner/a-model.v2", revision="c" * 40)
    assert origin(tmp_path) is None


@pytest.mark.parametrize("reference", ["owner/name", "owner/name#v1.0", "owner/name#refs/pr/1"])
def test_hub_ids(reference: str) -> None:
    assert is_hub_id(reference)


@pytest.mark.parametrize(
    "reference", ["./name", "/models/x", "~/x", "s3://bucket/x", "name", "a/b/c", "tests/training"]
)
def test_what_is_no_hub_id(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert not is_hub_id(reference)


def test_what_is_being_fetched_is_counted_and_what_was_there_before_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("AFT_RAY_CACHE", str(tmp_path / "aft_ray"))
    assert fetched_bytes(since=0) == 0
    files = {
        "hub/models--owner--there/blobs/1234": 1,
        "hub/models--owner--tiny/blobs/abcd.incomplete": 10,
        "aft_ray/copies/model-12.partial/weights/model.safetensors": 100,
        "aft_ray/models/converted/model.safetensors": 1000,
    }
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"." * size)
    os.utime(tmp_path / "hub/models--owner--there/blobs/1234", (1000, 1000))
    assert fetched_bytes(since=2000) == 110


def test_folders_that_get_their_own_name_while_they_are_counted_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count runs in the thread by which a worker reports that it lives."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("AFT_RAY_CACHE", str(tmp_path))
    partial, whole = tmp_path / "copies" / "model.partial", tmp_path / "copies" / "model"
    for number in range(20):
        (partial / str(number)).mkdir(parents=True)
        (partial / str(number) / "weights").write_bytes(b".")
    is_over = threading.Event()

    def rename() -> None:
        while not is_over.is_set():
            partial.rename(whole)
            whole.rename(partial)

    renaming = threading.Thread(target=rename)
    renaming.start()
    try:
        assert all(0 <= fetched_bytes(since=0) <= 40 for _ in range(300))
    finally:
        is_over.set()
        renaming.join()
