"""The stock clients in environments of their own, all in front of the one shared application: whole programs over HTTP.

`clients/` has the programs and what they need. An environment is made once, in `.cache/clients`; where a package
manager or its registry is missing, its test is skipped with the reason. `AFT_RAY_CLIENTS` may name a folder that holds
them already.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak

PROGRAMS = Path(__file__).parent / "clients"
CACHE = Path(os.environ.get("AFT_RAY_CLIENTS") or Path(__file__).parents[2] / ".cache" / "clients")
INSTALL_S = 240  # within the time limit of a test, so that a slow registry is a skip


def run(*command: str | Path, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    # the settings of a developer's own account, and this repository, are none of the client's business
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
    return subprocess.run(
        [str(part) for part in command],
        check=False,
        env=own | environment,
        text=True,
        capture_output=True,
        timeout=timeout_s,
    )


def installed(place: Path, specification: Path, install: Callable[[Path], list[list[str]]]) -> None:
    """Make an environment, once for each state of its specification. Skips the test where that is not possible."""
    mark = place / f".{hashlib.sha256(specification.read_bytes()).hexdigest()[:12]}"
    if mark.exists():
        return
    shutil.rmtree(place, ignore_errors=True)
    for command in install(place):
        try:
            done = run(*command, timeout_s=INSTALL_S)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{command[0]} did not install {specification.name} within {INSTALL_S} s")
        if done.returncode:
            pytest.skip(f"{command[0]} cannot install {specification.name}: {done.stderr.strip()[-300:]}")
    mark.touch()


@pytest.fixture(scope="session")
def python() -> Path:
    """Return the interpreter of an environment with LangChain and LiteLLM."""
    needs = PROGRAMS / "requirements.txt"

    def install(place: Path) -> list[list[str]]:
        pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        return [[sys.executable, "-m", "venv", str(place)], [*pip, "--requirement", str(needs)]]

    installed(CACHE / "python", needs, install)
    return CACHE / "python" / "bin" / "python"


@pytest.fixture(scope="session")
def node() -> Path:
    """Return the folder of an environment with OpenAI's client in JavaScript."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node and npm on PATH")
    needs, place = PROGRAMS / "package.json", CACHE / "node"

    def install(place: Path) -> list[list[str]]:
        place.mkdir(parents=True)
        shutil.copy(needs, place)
        return [["npm", "install", "--no-audit", "--no-fund", "--prefix", str(place)]]

    installed(place, needs, install)
    return place


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("client", ["langchain", "litellm"])
def test_python_clients(client: str, python: Path, base_url: str) -> None:
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}
    check(run(python, PROGRAMS / f"{client}_client.py", base_url, **offline))


def test_the_javascript_client(node: Path, base_url: str) -> None:
    program = Path(shutil.copy(PROGRAMS / "openai_client.mjs", node))  # it finds its packages beside itself
    check(run("node", program, base_url))


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("tenacity") is None,
    reason="lm-eval and its client's packages are not installed",
)
def test_lm_eval_generates_through_chat_completions(base_url: str) -> None:
    check(run(sys.executable, PROGRAMS / "lm_eval_client.py", base_url, OPENAI_API_KEY="none"))
