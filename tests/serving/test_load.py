"""The load script in its short form: many clients, killed replicas of both topologies, and no leaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from aft_ray.serving.app import free_port

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parents[2]
HAPROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0"}
"""What docs/operations.md (A faster way through Serve) names."""


@pytest.mark.parametrize(
    ("topology", "way"),
    [
        ("shared", {}),
        ("split", {}),
        pytest.param("shared", HAPROXY, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only")),
    ],
    ids=["shared", "split", "haproxy"],
)
def test_every_request_ends_typed_and_in_time_while_replicas_are_killed(
    tmp_path: Path, topology: str, way: dict[str, str]
) -> None:
    """The same for half a minute that RESULTS.md reports for five minutes and 200 clients."""
    report = tmp_path / "report.json"
    settings = [
        "--topology",
        topology,
        "--minutes",
        "0.5",
        "--clients",
        "40",
        "--kill-every",
        "6",
        "--json",
        str(report),
    ]
    command = [sys.executable, "benchmarks/serving_load.py", *settings]
    own = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port("127.0.0.1")) for name in ("METRICS", "STATS")}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **way, **own}, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert report.exists(), done.stderr[-2000:]
    numbers = json.loads(report.read_text())
    assert numbers["problems"] == [], numbers
    assert numbers["killed"] >= 3
    assert numbers["outcomes"]["answered"] > 40
