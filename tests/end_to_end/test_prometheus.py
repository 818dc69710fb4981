"""A real Prometheus with the shipped configuration finds a real head, and answers what the dashboards ask."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from aft_ray.pipeline.job_server import JobServer
from tests.command_line import ROOT
from tests.deploy.test_observability import DASHBOARDS, FOLDER, dashboard
from tests.ray_head import Head, free_port, submit
from tests.serving.test_metrics import DASHBOARD, queries

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus on PATH (Debian: prometheus)"),
]

COUNTING = """
import time, ray
from tests.test_metrics import Counting
ray.init(log_to_driver=False)
counting = ray.remote(num_cpus=0)(Counting).remote()
while True:
    ray.get(counting.count.remote())
    time.sleep(0.5)
"""
"""A driver that counts what stages and trainings count, until it is killed."""


@pytest.fixture(scope="module")
def prometheus(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The API of a Prometheus that reads the head, on which metrics are being counted."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    shipped = (FOLDER / "prometheus.yml").read_text()
    assert shipped.count("/tmp/ray/") == shipped.count("scrape_interval: 10s") == 1
    own = shipped.replace("/tmp/ray/", f"{head.folder}/ray/").replace("scrape_interval: 10s", "scrape_interval: 2s")
    (folder / "prometheus.yml").write_text(own)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    [gcs] = [argument.partition("=")[2] for argument in head.command if argument.startswith("--port=")]
    environment = {**head.environment, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    with (folder / "prometheus.log").open("w") as log:
        reading = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        counting = subprocess.Popen([sys.executable, "-c", COUNTING], env=environment, stdout=log, stderr=log)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as client:
                wait_for_rows(client, Path(log.name))
                yield client
        finally:
            for process in (counting, reading):
                process.kill()
                process.wait()


def wait_for_rows(client: httpx.Client, log: Path) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            if asked(client, "ray_aft_rows_total"):
                return
        except httpx.TransportError:  # not listening yet
            pass
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.5)


def asked(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    """Return what Prometheus answers to the query of a panel. Raises AssertionError where it does not understand it."""
    query = query.replace("$__rate_interval", "10s").replace("$run", ".*").replace("$model", ".*")
    answer = client.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def panels(board: dict[str, Any]) -> list[str]:
    return [query for query in queries(board) if not query.startswith("label_values(")]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_panel_of_a_dashboard_shows_what_was_counted(name: str, prometheus: httpx.Client) -> None:
    wait_until_shown(prometheus, panels(dashboard(name)))


def wait_until_shown(client: httpx.Client, queries: list[str]) -> None:
    """Wait until every query has a series with a value above zero, which NaN is not."""
    end = time.monotonic() + 60
    while queries := [query for query in queries if not any(last(one) > 0 for one in asked(client, query))]:
        assert time.monotonic() < end, queries
        time.sleep(1)


def last(series: dict[str, Any]) -> float:
    return float(series["value"][1])


def test_a_dashboard_offers_the_runs_that_counted(prometheus: httpx.Client) -> None:
    for metric in ("ray_aft_rows_total", "ray_aft_train_steps_total"):
        answer = prometheus.get("/label/run/values", params={"match[]": metric}).json()
        assert "counted" in answer["data"]


def test_prometheus_understands_every_question_of_the_dashboard_for_serving(prometheus: httpx.Client) -> None:
    for query in panels(json.loads(DASHBOARD.read_text())):
        asked(prometheus, query)


def test_ray_and_its_node_are_seen_beside_our_metrics(prometheus: httpx.Client) -> None:
    targets = prometheus.get("/targets").json()["data"]["activeTargets"]
    assert {target["labels"]["job"] for target in targets} == {"ray"}
    wait_until_shown(prometheus, ['up{job="ray"}', "ray_node_mem_total"])


def test_the_rows_of_a_job_arrive(
    head: Head, project: Path, prometheus: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    slow = ["--set", "engine={type: scripted, seconds_per_token: 3}", "--set", "prompts.rows_per_shard=1"]
    sent = submit(head, project, "pipeline", "--no-wait", *slow, "--set", f"run.dir={tmp_path / 'as-a-job'}")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    [job] = re.findall(r"^submitted (\w+)", sent.stdout, re.MULTILINE)
    query = 'sum(ray_aft_rows_total{run="as-a-job",stage="proposals",outcome="ok"})'
    end = time.monotonic() + 240
    while [series["value"][1] for series in asked(prometheus, query)] != ["4"]:
        assert time.monotonic() < end, "the rows of the run never reached Prometheus"
        time.sleep(1)
    JobServer.at(head.url).stop(job)
