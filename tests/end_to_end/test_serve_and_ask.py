"""`aft-ray serve` as a process, as a person starts and ends it, and `aft-ray ask`."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from tests.command_line import ROOT, aft_ray

AFT_RAY = [sys.executable, "-m", "aft_ray"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path_factory.mktemp("serve") / "run.yaml"
    run = {
        "run": {"dir": str(config.parent / "run")},
        "engine": {"type": "scripted", "answers": ["the Nile", "the Congo", "the Niger"]},
        "serving": {"port": port, "plan": {"num_proposals": 3}},
    }
    config.write_text(yaml.safe_dump(run))
    process = subprocess.Popen(
        [*AFT_RAY, "serve", "--config", str(config)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving at"):
            break
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0


def ask(server: str, *arguments: str) -> str:
    done = aft_ray("ask", "Name a river.", "--base-url", server, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_answer_is_printed(server: str) -> None:
    assert ask(server).strip() == "the Nile"


def test_the_proposals_are_shown_on_request(server: str) -> None:
    printed = ask(server, "--show-proposals", "--model", "base@k3-l1")
    assert [word in printed for word in ("the Nile", "the Congo", "the Niger")] == [True] * 3
    assert printed.index("draft 3") < printed.index("answer")


def test_an_unknown_model_is_answered_with_the_known_ones(server: str) -> None:
    done = aft_ray("ask", "Hello?", "--base-url", server, "--model", "nobody")
    assert done.returncode == 1
    assert "404" in done.stderr
    assert "base" in done.stderr
