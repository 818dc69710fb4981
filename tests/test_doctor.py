"""`aft-ray doctor`: what it finds, what it says to do, and its exit code. test_jobs.py asks a job server, too."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from aft_ray.config import OpenAIEngineConfig, load_config
from aft_ray.pipeline import machine
from aft_ray.pipeline.needs import needs
from aft_ray.pipeline.reach import hub_datasets, hub_models, reach_endpoint, reach_hub
from tests.command_line import ROOT, aft_ray


class Answers(BaseHTTPRequestHandler):
    """A hub and an endpoint of a test: it knows one model of each kind, and one key."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            known = self.headers["Authorization"] == "Bearer good"
            self._answer(200 if known else 401, {"data": [{"id": "teacher"}]})
        elif "/owner/open/" in self.path:
            self._answer(200, {})
        elif "/owner/gated/" in self.path:
            self._answer(403, {"error": "gated"}, "GatedRepo")
        else:
            self._answer(404, {"error": "not found"}, "RepoNotFound")

    def _answer(self, status: int, body: object, code: str = "") -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def answers() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Name a bird."}\n')
    run = {
        "run": {"dir": str(tmp_path / "run")},
        "engine": {"type": "scripted"},
        "prompts": {"source": str(tmp_path / "prompts.jsonl")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return str(tmp_path / "run.yaml")


def test_a_run_that_has_all_it_needs(ray_cluster: None, config: str) -> None:
    done = aft_ray("doctor", "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proposals: 1 worker of 1 CPU (proposals.placement)" in done.stdout
    assert done.stdout.endswith("no problems found\n")


def test_every_problem_is_listed_with_what_to_do(ray_cluster: None, config: str) -> None:
    settings = [
        "targets.placement.num_cpus=64",
        "targets.engine={type: openai, base_url: 'http://127.0.0.1:9/v1', model: t, api_key_env: NO_SUCH_KEY}",
        "run.environment=[NO_SUCH_VARIABLE]",
        "templates.aggregator=nowhere.yaml",
    ]
    done = aft_ray("doctor", "--config", config, *(part for setting in settings for part in ("--set", setting)))
    assert done.returncode == 2
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    for words in (
        "nowhere.yaml",
        "environment variables are missing: NO_SUCH_VARIABLE",
        "set them there",
        "targets.placement requests 64 CPU per worker, and no node has that",
        "Request less or use a larger cluster",
        "the environment variable NO_SUCH_KEY holds no key. Set it on every node",
    ):
        assert any(words in line for line in problems), (words, done.stdout)
    assert "Traceback" not in done.stdout + done.stderr


def test_versions_other_than_the_tested_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "TESTED", {"ray": "1.9", "no-such-package": "3.0"})
    problems = [str(finding) for finding in machine.machine_findings() if finding.kind == "problem"]
    assert any("ray 2." in line and "tested with 1.9.x. Run make setup" in line for line in problems)
    assert any("no-such-package is missing. Run make setup" in line for line in problems)


def test_a_gpu_and_the_installation_for_cpus_do_not_fit() -> None:
    found = list(machine._gpus([("NVIDIA H100", "81559 MiB", "535.104.05")]))
    assert "1 x NVIDIA H100, 81559 MiB, driver 535.104.05" in str(found[0])
    assert found[1].kind == "problem" and found[1].remedy


@pytest.mark.parametrize(
    ("reference", "kind", "words"),
    [
        ("owner/open", "ok", "found on the hub"),
        ("owner/gated", "problem", "access is not granted without a token (HF_TOKEN is not set). Accept its terms at"),
        ("owner/unknown", "problem", "not found on the hub without a token (HF_TOKEN is not set). Check the name"),
    ],
)
def test_models_are_looked_up_on_the_hub(answers: str, reference: str, kind: str, words: str) -> None:
    code = f"from aft_ray.pipeline.reach import reach_hub; print(reach_hub('engine.model', {reference!r}, 'model'))"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
        env={**kept, "HF_ENDPOINT": answers, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.startswith(f"{kind:<8} engine.model {reference}: ") and words in done.stdout


def test_without_the_network_the_hub_is_said_to_be_out_of_reach() -> None:
    found = reach_hub("engine.model", "owner/open", "model")  # tests run with HF_HUB_OFFLINE
    assert (found.kind, found.remedy) == ("problem", "Unset it")


def test_what_is_looked_up(config: str) -> None:
    settings = [
        "engine={type: vllm, model: owner/base}",
        "targets.engine={type: vllm, model: owner/base}",
        "scores={scorer: reward_model, reward_model: owner/reward}",
        "prompts.source=hub:owner/prompts@main:train_sft#v2",
        "proposals.engine={type: transformers, model: smollm2-135m-instruct}",
        "serving.adapters={aft: owner/lora#v1, sft: /shared/sft}",
        "evaluation.prompts={source: 'hub:owner/asked:test'}",
    ]
    loaded = load_config(config, settings)
    assert list(hub_models(loaded)) == [
        ("engine.model", "owner/base"),
        ("scores.reward_model", "owner/reward"),
        ("serving.adapters.aft", "owner/lora#v1"),
    ]
    assert list(hub_datasets(loaded)) == [
        ("prompts.source", "owner/prompts"),
        ("evaluation.prompts.source", "owner/asked"),
    ]


@pytest.mark.parametrize(
    ("key", "model", "words"),
    [
        ("good", "teacher", "ok       targets.engine {url}: answers"),
        ("bad", "teacher", "does not accept the key in THE_KEY. Set the key of this endpoint"),
        ("good", "other", "serves no model other. Ask {url}/models for those that it serves"),
    ],
)
def test_an_endpoint_is_asked_for_its_models(
    answers: str, monkeypatch: pytest.MonkeyPatch, key: str, model: str, words: str
) -> None:
    monkeypatch.setenv("THE_KEY", key)
    engine = OpenAIEngineConfig(base_url=f"{answers}/v1", model=model, api_key_env="THE_KEY")
    assert words.format(url=engine.base_url) in str(reach_endpoint("targets.engine", engine))


def test_an_endpoint_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "good")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        found = reach_endpoint("engine", OpenAIEngineConfig(base_url=url, model="m", api_key_env="THE_KEY"))
    assert str(found).endswith("does not answer (ConnectionError). Check base_url and the network")


def test_the_needs_of_every_step_follow_from_its_engine(config: str) -> None:
    settings = ["engine={type: vllm, model: m/m, tensor_parallel_size: 4}", "targets.placement.max_actors=3"]
    settings += ["training.num_workers=8", "scores={scorer: reward_model, reward_model: m/r}"]
    found = {need.step: need for need in needs(load_config(config, settings))}
    assert (found["targets"].most, found["targets"].engine_gpus) == (3, 4)
    assert (found["scores"].engine_gpus, found["selection"].engine_gpus) == (1, 0)
    assert (found["train"].least, found["train"].most) == (8, 8)
    assert list(found) == ["proposals", "scores", "selection", "targets", "training_set", "train", "evaluate"]
