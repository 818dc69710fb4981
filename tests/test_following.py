"""What following a job prints and returns, where no cluster is needed; test_jobs.py has the rest."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from aft_ray.errors import ConfigError
from aft_ray.pipeline.following import Printed, exit_code_of
from aft_ray.pipeline.job_server import Job, find_token
from tests.command_line import aft_ray


def job(status: str, exit_code: int | None = None, message: str = "") -> Job:
    return Job(
        id="j", status=status, entrypoint="", message=message, exit_code=exit_code, started=0, ended=9, metadata={}
    )


@pytest.mark.parametrize(
    ("ended", "code", "words"),
    [
        (job("SUCCEEDED", 0), 0, ""),
        (job("FAILED", 3), 3, ""),
        (job("STOPPED"), 130, "stopped on request (aft-ray stop, ray job stop or the dashboard)"),
        (job("FAILED", -9), 137, "killed (SIGKILL)"),
        (
            job("FAILED", message="the node of its driver died\nTraceback"),
            1,
            "job j failed: the node of its driver died",
        ),
    ],
    ids=["done", "its-own-code", "stopped", "killed", "lost"],
)
def test_the_exit_code_is_the_jobs_own(ended: Job, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(ended) == code
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
    assert bool(words) == bool(said), "what the job itself has said is not said again"


def test_a_log_is_printed_once_over_several_streams(capsys: pytest.CaptureFixture[str]) -> None:
    printed, log = Printed(), "one\ntwo\nthree\n"
    position = printed.show(log[:6], 0)
    assert printed.show(log[6:8], position) == 8
    position = printed.show(log[:3], 0)  # a second stream begins at the beginning, in pieces of another size
    printed.show(log[3:], position)
    printed.show(log, 0)
    assert capsys.readouterr().out == log


@pytest.mark.parametrize("command", [["jobs"], ["logs", "j"], ["status", "j"], ["stop", "j"]], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:8265", "--address 127.0.0.1:8265: expected http://HOST:PORT"),
        ("http://127.0.0.1:{free}", "does not answer: nothing listens there"),
    ],
    ids=["no-scheme", "no-server"],
)
def test_an_address_that_cannot_work_is_said_in_one_sentence(command: list[str], address: str, words: str) -> None:
    with socket.socket() as taken:  # bound, and listening to nobody
        taken.bind(("127.0.0.1", 0))
        done = aft_ray(*command, "--address", address.format(free=taken.getsockname()[1]))
    assert done.returncode == 2
    assert words in done.stderr and done.stderr.count("\n") == 1


def test_the_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"requires a token, and there is none in RAY_AUTH_TOKEN, "):
        find_token("http://head:8265")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home\n")
    assert find_token("http://head:8265") == "of the home"
    (tmp_path / "named").write_text("of the file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert find_token("http://head:8265") == "of the file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    assert find_token("http://head:8265") == "of the environment"
