"""Clients, killed replicas, and nothing left behind: the load script in its short form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_request_ends_typed_and_in_time_while_replicas_are_killed(tmp_path: Path) -> None:
    """Five minutes and 200 clients are run by hand (RESULTS.md); this is the same for half a minute."""
    report = tmp_path / "report.json"
    settings = ["--minutes", "0.5", "--clients", "40", "--kill-every", "6", "--json", str(report)]
    command = [sys.executable, "benchmarks/serving_load.py", *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert report.exists(), done.stderr[-2000:]
    numbers = json.loads(report.read_text())
    assert numbers["problems"] == [], numbers
    assert numbers["killed"] >= 3
    assert numbers["outcomes"]["answered"] > 40
