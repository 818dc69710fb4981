"""The whole line with the real SmolLM2, as people run it: `make demo`, a Ray job on a running cluster, a Serve YAML."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.ray_head import free_port

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent

TINY = {
    "prompts.limit": 8,
    "prompts.held_out": 2,
    "prompts.rows_per_shard": 4,
    "proposals.num_per_prompt": 2,
    "proposals.sampling.max_tokens": 12,
    "targets.num_candidates": 1,
    "targets.sampling.max_tokens": 24,
    "targets.filters.finish_reasons": ["stop", "length"],
    "training.batch_size_per_worker": 2,
    "training.warmup_ratio": 0,  # of one step, all of it
    "evaluation.plan.proposal.max_tokens": 12,
    "evaluation.plan.final.max_tokens": 12,
}
STAGES = ("prompts", "proposals", "scores", "selection", "targets", "training_set")


def settings(**others: Any) -> list[str]:
    return [part for key, value in {**TINY, **others}.items() for part in ("--set", f"{key}={value}")]


def check_run(folder: Path) -> None:
    """Everything a finished run owes: all rows at every stage, two adapters, answers, perplexities, a report."""
    manifests = [json.loads((folder / stage / "manifest.json").read_text()) for stage in STAGES]
    assert [manifest["status"] for manifest in manifests] == ["done"] * len(STAGES)
    assert [manifest["rows_out"] for manifest in manifests[:-1]] == [8] * 5
    assert manifests[-1]["rows_out"] + 2 * sum(manifests[-1]["filtered"].values()) == 16
    for variant in ("sft", "aft"):
        assert (folder / "model" / variant / "adapter_model.safetensors").stat().st_size > 100_000
    results = json.loads((folder / "report" / "results.json").read_text())
    assert [system["system"] for system in results["systems"]] == ["base", "sft", "aft"]
    assert all(system["final"]["num"] == 2 for system in results["systems"])
    assert len(results["perplexities"]) == 4
    assert all(one["perplexity"] > 1 for one in results["perplexities"])
    page = (folder / "report" / "report.html").read_text()
    assert "does not show" in page


@dataclass(frozen=True)
class Demo:
    """A finished `make demo`."""

    command: list[str]
    folder: Path
    said: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`make demo` with tiny sizes for its first part; the study is the real one."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    arguments = shlex.join(settings(**{"run.dir": folder}))
    command = ["make", "demo", f"ARGS={arguments}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=2400)
    assert done.returncode == 0, done.stderr
    return Demo(command, folder, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def study(demo: Demo) -> dict[str, Any]:
    """results.json of the study that the demo made, whose page needs nothing else."""
    report = demo.folder / "miniature" / "report"
    page = (report / "miniature.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    found: dict[str, Any] = json.loads((report / "results.json").read_text())
    return found


@pytest.mark.model
@pytest.mark.timeout(2700)  # four minutes alone; several times that on a slow machine beside another test
def test_make_demo_runs_the_method_and_a_second_time_finishes_in_seconds(demo: Demo) -> None:
    folder = demo.folder
    check_run(folder)
    for words in ("proposals", "train", "Does training to aggregate work?", "report:", "try next:"):
        assert words in demo.said
    method = json.loads((folder / "report" / "results.json").read_text())["method"]
    assert len(method["sentences"]) >= 3 and len(method["points"]) == 9
    assert (folder / "report" / method["page"]).is_file()
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    subprocess.run(demo.command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=200)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")} == made


def verdict(study: Mapping[str, Any], first: list[str], second: list[str]) -> str:
    sides = [[one["question"][side] for side in ("first", "second")] for one in study["differences"]]
    return str(study["differences"][sides.index([first, second])]["verdict"])


def test_aggregation_is_learned_from_aggregation_fine_tuning_alone(study: dict[str, Any]) -> None:
    """What held by a wide margin (RESULTS.md); the rest is in the study's page."""
    assert verdict(study, ["aft", "L=1"], ["aft", "vote"]) == "higher"
    assert verdict(study, ["aft", "L=1"], ["sft", "L=1"]) == "higher"
    assert verdict(study, ["aft", "L=1"], ["base", "L=1"]) == "higher"
    assert verdict(study, ["sft", "L=1"], ["sft", "single"]) == "lower"


def test_proposals_stop_confusing_the_model_that_was_trained_to_read_them(study: dict[str, Any]) -> None:
    nats = {one["condition"]: one["nats_per_token"]["mean"] for one in study["surprises"]}
    assert nats["AFT, prompt + proposals"] < nats["base, prompt + proposals"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a person at a cluster: `ray start --head`, its job server, a token, our commands on PATH.

    The ports keep out of Ray's own range for workers, 10002-19999.
    """
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ADDRESS": "127.0.0.1:6397",
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8297",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONUNBUFFERED": "1",
    }
    head = ["ray", "start", "--head", "--block", "--port=6397", "--dashboard-port=8297", "--num-cpus=4"]
    head += ["--dashboard-agent-listen-port=52397", "--disable-usage-stats", "--include-dashboard=true"]
    log = tmp_path_factory.mktemp("cluster") / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            head, env={k: v for k, v in environment.items() if k != "RAY_ADDRESS"}, stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + 120
        while subprocess.run(["ray", "job", "list"], env=environment, capture_output=True, check=False).returncode:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
        yield environment
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in family:  # `ray start --block` would take half a minute to end them
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(60)


@pytest.mark.model
def test_the_scripts_of_jobs_run_as_ray_jobs(cluster: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for stage in ("prompts", "proposals"):
        script = ["python", f"jobs/{stage}.py", "--config", "configs/quickstart.yaml"]
        job = ["ray", "job", "submit", "--working-dir", str(ROOT), "--", *script, *settings(**{"run.dir": folder})]
        done = subprocess.run(job, env=cluster, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert stage in done.stdout
    manifest = json.loads((folder / "proposals" / "manifest.json").read_text())
    assert (manifest["status"], manifest["rows_out"]) == ("done", 8)
    assert manifest["completion_tokens"] > 0


def test_aft_ray_submit_follows_a_job_to_its_exit_code(cluster: dict[str, str], tmp_path: Path) -> None:
    scripted = ["--set", "engine={type: scripted}", "--set", f"run.dir={tmp_path / 'run'}"]
    submit = ["aft-ray", "submit", "prompts", "--config", "configs/quickstart.yaml", *scripted]
    done = subprocess.run(submit, env=cluster, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prompts       done: 24 rows" in done.stdout
    refused = subprocess.run(
        [*submit, "--resume", "never"], env=cluster, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert refused.returncode == 4
    assert "--resume" in refused.stdout + refused.stderr


@pytest.mark.model
def test_serve_run_deploys_the_yaml_and_it_answers(cluster: dict[str, str], tmp_path: Path) -> None:
    shape = yaml.safe_load((ROOT / "serve_configs" / "quickstart.yaml").read_text())
    port = shape["http_options"]["port"] = free_port()
    (tmp_path / "shape.yaml").write_text(yaml.safe_dump(shape))
    # what a shell starts in the background ignores SIGINT, and so does all that it starts
    command = ["env", "--default-signal=INT", "serve", "run", str(tmp_path / "shape.yaml")]
    server = subprocess.Popen(command, env=cluster, cwd=ROOT)
    try:
        body = {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 8}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            end = time.monotonic() + 400
            while not is_ready(http):
                assert server.poll() is None and time.monotonic() < end, "the endpoint did not come up"
                time.sleep(1)
            response = http.post("/v1/chat/completions", json=body, timeout=end - time.monotonic())
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["usage"]["aft"]["layers"][0]["num_answers"] == 3
        assert answer["choices"][0]["message"]["content"].strip()
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(90) == 0


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/ready", timeout=20).is_success
    except httpx.TransportError:
        return False  # nothing listens yet, or Serve waits for its first replica
