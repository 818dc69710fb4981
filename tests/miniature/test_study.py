"""The method itself: from the stored base model through every stage of a run, as `make miniature` does with more of it.

The tests guard what held by a wide margin (RESULTS.md); the rest is in the study's page.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.soak

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """results.json of a short study with one seed."""
    folder = tmp_path_factory.mktemp("miniature") / "study"
    command = [sys.executable, "-m", "aft_ray.miniature", "study", "--config", "configs/miniature/quick.yaml"]
    command += ["--seeds", "1", "--set", f"run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (folder / "report" / "miniature.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    return json.loads((folder / "report" / "results.json").read_text())


def difference(study: dict[str, Any], first: list[str], second: list[str]) -> dict[str, Any]:
    return next(
        one
        for one in study["differences"]
        if [one["question"][side] for side in ("first", "second")] == [first, second]
    )


@pytest.mark.timeout(1600)
def test_aggregation_is_learned_from_aggregation_fine_tuning_alone(study: dict[str, Any]) -> None:
    assert difference(study, ["aft", "L=1"], ["sft", "L=1"])["verdict"] == "higher"
    assert difference(study, ["aft", "L=1"], ["base", "L=1"])["verdict"] == "higher"
    assert difference(study, ["sft", "L=1"], ["sft", "single"])["verdict"] == "lower"


def test_proposals_stop_confusing_the_model_that_was_trained_to_read_them(study: dict[str, Any]) -> None:
    nats = {one["condition"]: one["nats_per_token"]["mean"] for one in study["surprises"]}
    assert nats["AFT, prompt + proposals"] < nats["base, prompt + proposals"]
