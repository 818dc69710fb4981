"""The hosts of `hosts.py` are separate: what one has on its loopback and in its home is not there on another."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.hosts import hosts, needs_hosts

pytestmark = [pytest.mark.soak, needs_hosts]

SERVE = "import http.server as h; h.HTTPServer(({address!r}, 8000), h.SimpleHTTPRequestHandler).serve_forever()"
FETCH = "import urllib.request as r; print(r.urlopen('http://{address}:8000/README.md', timeout=2).status)"


def test_hosts_share_a_network_and_files_but_no_loopback_and_no_home() -> None:
    with hosts(2) as cluster:

        def reaches(host: int, address: str) -> bool:
            done = cluster.run(host, [sys.executable, "-c", FETCH.format(address=address)], check=False)
            return done.returncode == 0

        for address in ("127.0.0.1", cluster.address(0)):
            server = cluster.start(0, [sys.executable, "-c", SERVE.format(address=address)])
            assert any(reaches(0, address) for _ in range(50))
            assert reaches(1, address) is (address != "127.0.0.1")
            if address != "127.0.0.1":
                cluster.cut(1)
                assert not reaches(1, address)
                cluster.heal(1)
                assert any(reaches(1, address) for _ in range(20)), "the bridge takes a moment"
            server.kill()
            server.wait()
        cluster.run(0, ["touch", str(cluster.home(0) / "mine")])
        assert not cluster.run(1, ["sh", "-c", "ls $HOME"]).stdout
        sleeper = cluster.start(1, ["sleep", "600"])
        cluster.kill(1)
        assert sleeper.wait(10) != 0
        name, folder = cluster.name, cluster.folder
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert name not in left
    assert not folder.exists()


def test_a_ray_cluster_has_a_head_without_cpus_and_a_worker_on_another_host() -> None:
    with hosts(2) as cluster:
        cluster.start_ray(num_cpus=(0, 2))
        ask = "import ray; ray.init(log_to_driver=False); where = ray.remote(ray.util.get_node_ip_address); "
        ask += "print('ON', ray.get(where.remote()))"
        assert f"ON {cluster.address(1)}" in cluster.run(0, [sys.executable, "-c", ask]).stdout
