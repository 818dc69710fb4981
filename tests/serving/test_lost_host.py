"""A server on three hosts, of which one drops off the network under load: requests go on, and it stops without it.

The head has no CPUs: it listens, and every replica is on another host.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.hosts import QUICK, hosts, needs_hosts

pytestmark = [pytest.mark.soak, needs_hosts, pytest.mark.timeout(600)]

LOAD = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import httpx

url, until = sys.argv[1], time.monotonic() + float(sys.argv[2])
body = {"messages": [{"role": "user", "content": "hi"}]}

def keep_asking(number):
    found = []
    while time.monotonic() < until:
        began = time.monotonic()
        reply = httpx.post(f"{url}/chat/completions", json=body, timeout=90)
        found.append((reply.status_code, round(time.monotonic() - began, 1), until - began, reply.text[:200]))
    return found

with ThreadPoolExecutor(4) as clients:
    print(json.dumps([one for found in clients.map(keep_asking, range(4)) for one in found]))
"""
WHERE = """
import json, ray
from ray.util.state import list_actors
ray.init(log_to_driver=False, logging_level="ERROR")
address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
alive = list_actors(filters=[("state", "=", "ALIVE")])
print(json.dumps([(one.name, address[one.node_id]) for one in alive if "SERVE_REPLICA" in (one.name or "")]))
"""
LOST_S, LOAD_S = 8.0, 45.0
"""When the host is lost, and how long clients ask."""
SLOWEST_S = 30.0


def write_config(folder: Path) -> Path:
    replicas = {"num_cpus": 0.5, "min_replicas": 2, "max_replicas": 2}
    config = {
        "run": {"dir": str(folder / "run")},
        "engine": {"type": "scripted", "seconds_per_token": 0.01},
        "serving": {
            "port": 8000,
            "plan": {"num_proposals": 2, "num_layers": 1},
            "ingress": replicas,
            "aggregator": {**replicas, "max_ongoing_requests": 16},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def test_a_lost_host_costs_few_requests_and_a_server_stops_without_it(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with hosts(3) as cluster:
        cluster.start_ray(num_cpus=(0, 1, 1), env=QUICK)
        log = tmp_path / "serve.log"
        server = cluster.start(0, [sys.executable, "-m", "aft_ray", "serve", "--config", str(config)], log=log)
        end = time.monotonic() + 120
        while "serving at" not in log.read_text():
            assert time.monotonic() < end and server.poll() is None, log.read_text()
            time.sleep(0.2)
        where = json.loads(cluster.run(0, [sys.executable, "-c", WHERE]).stdout.splitlines()[-1])
        of_ingress = [address for name, address in where if "#Ingress#" in name]
        assert sorted(of_ingress) == [cluster.address(1), cluster.address(2)], where

        url = "http://127.0.0.1:8000/v1"
        load = cluster.start(0, [sys.executable, "-c", LOAD, url, str(LOAD_S)])
        time.sleep(LOST_S)
        cluster.cut(1)
        out, err = load.communicate(timeout=LOAD_S + 120)
        assert load.returncode == 0, err[-3000:]
        answers = json.loads(out.splitlines()[-1])
        failed = [answer for answer in answers if answer[0] != 200]
        assert len(answers) > 50 and len(failed) <= 8, (len(answers), failed, err[-2000:])
        assert [text for status, _, _, text in failed if status not in (500, 502, 503)] == []
        assert max(seconds for _, seconds, _, _ in answers) < SLOWEST_S
        assert [status for status, _, left, _ in answers if left < 5] and not [one for one in failed if one[2] < 5]

        began = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0, log.read_text()[-4000:]
        said = log.read_text()
        assert time.monotonic() - began < 90, said
        assert "Traceback" not in said and "failed to shut down" not in said, said
