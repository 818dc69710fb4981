"""The Dockerfile: what is in the image is what the locks say, and what must not be in it is never sent to the build."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from aft_ray.pipeline.upload import SECRETS

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TEXT = (ROOT / "Dockerfile").read_text()
LOGICAL = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", TEXT))
INSTRUCTIONS = [tuple(line.strip().split(maxsplit=1)) for line in LOGICAL.splitlines() if line.strip()]


VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DEVICES = ("gpu", "cpu")


def all_of(name: str) -> list[str]:
    return [re.sub(r"\s+", " ", rest) for instruction, rest in INSTRUCTIONS if instruction == name]


def lock(device: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{device}.txt").read_text().split()
    return dict(line.split("==") for line in lines)


def test_hadolint_finds_nothing() -> None:
    linter = BIN / "hadolint"
    if not linter.exists():
        pytest.skip("make deploy-tools installs hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_bases_are_named_by_version_and_the_argument_chooses_one() -> None:
    bases = {name: image for image, name in (line.split(" AS ") for line in all_of("FROM") if " AS " in line)}
    assert bases == {"base-cpu": "ubuntu:24.04", "base-gpu": "nvidia/cuda:13.0.2-base-ubuntu24.04"}
    assert all_of("FROM")[-1] == "base-${DEVICE}"
    assert all_of("ARG")[0] == "DEVICE=gpu"


def test_the_cuda_of_the_base_is_that_of_the_lock() -> None:
    found = re.search(r"nvidia/cuda:(\d+\.\d+)\.\d+-", TEXT)
    assert found is not None
    assert lock("gpu")["nvidia-cuda-runtime"].startswith(found[1])
    assert not lock("gpu")["torch"].endswith("+cpu")
    assert lock("cpu")["torch"].endswith("+cpu"), "which the index of the CPU base has"


def test_every_package_comes_from_the_lock() -> None:
    installs = re.findall(r"pip install (.*?)(?= &&|$)", " && ".join(all_of("RUN")))
    from_lock, of_project = (
        [one for one in installs if "--requirement" in one],
        [one for one in installs if one.endswith(".")],
    )
    assert len(from_lock) + len(of_project) == len(installs) == 3
    assert all("--no-deps" in one for one in installs)
    assert "COPY requirements/${DEVICE}.txt requirements/" in LOGICAL
    assert "requirements/${DEVICE}.txt" in from_lock[-1]


def test_the_layer_of_the_largest_packages_holds_them_and_is_below_the_code() -> None:
    pattern = re.search(r"grep --extended-regexp '([^']+)'", TEXT)
    assert pattern is not None
    largest = [name for name in lock("gpu") if re.match(pattern[1], name)]
    assert {"torch", "triton", "vllm", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= set(largest)
    places = [
        LOGICAL.index(text) for text in ("/tmp/largest.txt", "${DEVICE}.txt\n\nCOPY", "COPY aft_ray", "COPY configs")
    ]
    assert places == sorted(places)


def test_it_runs_as_a_user_with_few_rights_and_wants_the_token() -> None:
    assert all_of("USER") == ["10001"], "a number: Kubernetes' runAsNonRoot cannot judge a name"
    assert "--uid 10001" in TEXT
    assert "RAY_AUTH_MODE=token" in " ".join(all_of("ENV")).split()
    assert all_of("EXPOSE") == []
    names = " ".join(all_of("ENV") + all_of("ARG"))
    assert not re.search(r"TOKEN\b(?!S)|SECRET|PASSWORD|API_KEY", names.replace("RAY_AUTH_MODE=token", ""))


def test_the_health_check_asks_routes_that_exist() -> None:
    (check,) = all_of("HEALTHCHECK")
    assert "http://127.0.0.1:8000/health || ray health-check" in check
    assert '"/health"' in (ROOT / "aft_ray" / "serving" / "http" / "api.py").read_text()
    from ray.scripts.scripts import cli

    assert "health-check" in cli.commands


def test_the_tag_in_the_instructions_is_the_version() -> None:
    assert set(re.findall(r"aft-ray:([\d.]+-[cg]pu)", TEXT)) == {f"{VERSION}-{device}" for device in DEVICES}


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A checkout with secrets in all places, and what a working folder collects."""
    for name in ("Dockerfile", ".dockerignore", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in (
        "aft_ray/serving",
        "jobs",
        "configs/miniature/base",
        "serve_configs",
        "requirements",
        "docs",
        "tests",
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "kept.py").touch()
    for name in ("requirements/cpu.txt", "requirements/gpu.txt", "configs/miniature/base/model.safetensors"):
        (tmp_path / name).touch()
    for name in (
        "runs/x/y.parquet",
        ".venv/bin/python",
        ".git/config",
        "data/prompts.jsonl",
        "aft_ray/__pycache__/a.pyc",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def sent(context: Path) -> set[str]:
    """Return the files of the folder that `docker build` sends: docker's own rules, by its Python client."""
    build = pytest.importorskip("docker.utils.build", reason="make deploy-tools installs docker's client")
    patterns = [line.strip() for line in (context / ".dockerignore").read_text().splitlines()]
    patterns = [line for line in patterns if line and not line.startswith("#")]
    paths = build.exclude_paths(str(context), patterns, dockerfile=("Dockerfile", None))
    return {path for path in paths if (context / path).is_file()}


def test_the_build_gets_what_it_copies_and_nothing_else(context: Path) -> None:
    assert sent(context) == {
        ".dockerignore",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements/cpu.txt",
        "requirements/gpu.txt",
        "aft_ray/serving/kept.py",
        "jobs/kept.py",
        "configs/miniature/base/kept.py",
        "configs/miniature/base/model.safetensors",
        "serve_configs/kept.py",
    }
    copied = {word for line in all_of("COPY") for word in line.split()[:-1]}
    assert copied == {
        "requirements/${DEVICE}.txt",
        *("pyproject.toml", "README.md", "LICENSE", "aft_ray", "jobs", "configs", "serve_configs"),
    }


@pytest.mark.parametrize("folder", ["", "aft_ray/serving", "configs"])
def test_no_secret_reaches_a_layer(context: Path, folder: str) -> None:
    before = sent(context)
    for pattern in SECRETS:
        name = pattern.replace("*", "x")
        planted = context / folder / (f"{name}/inner" if pattern in {"secrets"} or name.startswith(".") else name)
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.touch()
    assert sent(context) == before
