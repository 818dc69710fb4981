"""A cluster that cannot be reached, or that fails under a run, ends it with one sentence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from aft_ray.config import Config
from aft_ray.errors import ClusterError, InputError
from aft_ray.pipeline.cluster import RaySession, check_answers


def config(tmp_path: Path, address: str | None = None) -> Config:
    run = {"dir": str(tmp_path / "run"), "ray_address": address}
    return Config.model_validate({"run": run, "engine": {"type": "scripted"}})


@pytest.fixture
def unanswered_address() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def test_an_address_at_which_nothing_listens_is_said_within_seconds(unanswered_address: str) -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match=rf"no Ray cluster at {unanswered_address}: .*refused.*run\.ray_address"):
        check_answers(unanswered_address)
    assert time.monotonic() - started < 30, "Ray itself tries for 120 s"


def test_a_cluster_of_this_machine_that_does_not_answer_is_said_too(
    unanswered_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", unanswered_address)  # where Ray looks first
    with pytest.raises(ClusterError, match=r"no Ray cluster at .*refused"):
        check_answers("auto")


def test_a_ray_that_cannot_start_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config(tmp_path).model_dump_json(include={"run", "engine"}))
    code = "import sys; from aft_ray.config import load_config; from aft_ray.pipeline.cluster import RaySession\n"
    code += "RaySession(load_config(sys.argv[1])).connect()"
    command = [sys.executable, "-c", code, str(tmp_path / "run.yaml")]
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / ("x" * 100))}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("aft_ray.errors.ClusterError: Ray cannot start on this machine: ")
    assert "RAY_TMPDIR" in said


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_the_cluster_lost_is_one_sentence(ray_cluster: None, tmp_path: Path) -> None:
    with (
        pytest.raises(ClusterError, match=r"the Ray cluster failed: WorkerCrashedError: .*Finished work is kept"),
        RaySession(config(tmp_path)) as session,
    ):
        session.connect()
        ray.get(ray.remote(max_retries=0)(die).remote())


def fail() -> None:
    raise KeyError("a mistake of the program")


def test_an_error_of_the_program_and_one_of_ours_stay_what_they_are(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="a mistake of the program"), RaySession(config(tmp_path)):
        ray.get(ray.remote(fail).remote())
    with pytest.raises(InputError), RaySession(config(tmp_path)):
        raise InputError("a row is wrong")
