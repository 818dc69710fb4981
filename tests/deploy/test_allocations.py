"""deploy/with_ray.sh and what calls it: Slurm's script and SkyPilot's task. Ray over given nodes, then one command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.hosts import PORT, hosts, needs_hosts

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
SBATCH = DEPLOY / "slurm.sbatch"


def sky() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "sky.yaml").read_text())


def scripts(tmp_path: Path) -> list[Path]:
    """Return all shell code of deploy/, that of the SkyPilot task included."""
    found = [DEPLOY / "with_ray.sh", SBATCH]
    for part in ("setup", "run"):
        found.append(tmp_path / f"{part}.sh")
        found[-1].write_text(f"#!/usr/bin/env bash\n{sky()[part]}")
    return found


def test_the_shell_code_is_whole_and_shellcheck_finds_nothing(tmp_path: Path) -> None:
    found = scripts(tmp_path)
    for script in found:
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    linter = BIN / "shellcheck"
    if not linter.exists():
        pytest.skip("make deploy-tools installs shellcheck")
    done = subprocess.run([linter, *map(str, found)], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == ""


def test_no_script_turns_authentication_off_or_opens_the_dashboard(tmp_path: Path) -> None:
    text = "".join(script.read_text() for script in scripts(tmp_path))
    assert "RAY_AUTH_MODE=token" in (DEPLOY / "with_ray.sh").read_text()
    assert "--dashboard-host=127.0.0.1" in text
    assert not re.search(r"RAY_AUTH_MODE=(?!token)", text)
    assert "ray stop" not in text, "SkyPilot's own Ray is on the same nodes"
    assert all("serving.api_keys_env" in line for line in text.splitlines() if "0.0.0.0" in line)
    starts = [line for line in text.splitlines() if re.match(r"\s*ray start", line)]
    assert len(starts) == 2


# ── Slurm ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SRUN = """#!/usr/bin/env python3
import json, os, subprocess, sys
words = sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
if words[0] == "hostname":
    print("10.0.0.7 172.17.0.1")
    sys.exit()
codes = []
for rank in range(int(os.environ["SLURM_NNODES"])):
    codes.append(subprocess.run(words, env={**os.environ, "SLURM_PROCID": str(rank)}).returncode)
sys.exit(max(codes))
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && printf "node-a\\nnode-b\\n" || echo "scontrol $*" >> scontrol.log
"""
WITH_RAY = """#!/usr/bin/env python3
import json, os, sys
with open("calls.jsonl", "a") as calls:
    own = {key: os.environ[key] for key in ("RAY_PORT", "RAY_TMPDIR")}
    print(json.dumps({"arguments": sys.argv[1:], **own}), file=calls)
sys.exit(int(os.environ.get("EXIT", 0)) if sys.argv[1] == "0" else 0)
"""


@pytest.fixture
def allocation(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job over two nodes, in a folder whose with_ray.sh only says how it was called."""
    for name, text in {
        "bin/srun": SRUN,
        "bin/scontrol": SCONTROL,
        "deploy/with_ray.sh": WITH_RAY,
    }.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(7_000_042 + os.getpid() % 1000),
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
    }


def run_sbatch(environment: dict[str, str], *arguments: str, **variables: str) -> tuple[int, list[dict[str, Any]]]:
    command = ["bash", str(SBATCH), *arguments]
    done = subprocess.run(
        command, env={**environment, **variables}, check=False, timeout=60, capture_output=True, text=True
    )
    calls = Path(environment["SLURM_SUBMIT_DIR"]) / "calls.jsonl"
    return done.returncode, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_slurm_starts_ray_on_every_node_and_the_line_on_the_first(allocation: dict[str, str]) -> None:
    code, calls = run_sbatch(allocation, "configs/my run.yaml", "--set", "run.dir=/scratch/x y")
    line = ["python", "jobs/pipeline.py", "--config", "configs/my run.yaml", "--set", "run.dir=/scratch/x y"]
    assert code == 0
    assert [call["arguments"] for call in calls] == [[str(rank), "2", "10.0.0.7", *line] for rank in (0, 1)]
    port = int(calls[0]["RAY_PORT"])
    assert port == 20_000 + int(allocation["SLURM_JOB_ID"]) % 10_000
    assert calls[0]["RAY_TMPDIR"] == f"/tmp/aft-ray-{allocation['SLURM_JOB_ID']}"


def test_slurm_runs_a_single_stage_and_the_exit_code_is_the_jobs(allocation: dict[str, str]) -> None:
    code, calls = run_sbatch(allocation, "c.yaml", STEP="train", EXIT="3")
    assert calls[0]["arguments"][3:] == ["python", "jobs/train.py", "--config", "c.yaml"]
    assert (ROOT / calls[0]["arguments"][4]).is_file()
    assert code == 3


def test_slurm_without_a_config_says_how_it_is_used(allocation: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", str(SBATCH)], env=allocation, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert "usage: sbatch deploy/slurm.sbatch CONFIG" in done.stderr


def test_a_job_that_runs_out_of_time_is_queued_again(allocation: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "deploy" / "with_ray.sh").write_text("#!/bin/sh\nkill -USR1 $(cat batch.pid); sleep 0.5\n")
    script = f"echo $$ > {tmp_path}/batch.pid; exec bash {SBATCH} c.yaml"
    done = subprocess.run(
        ["bash", "-c", script], env=allocation, capture_output=True, text=True, check=False, timeout=60
    )
    assert "queued again" in done.stdout
    assert (tmp_path / "scontrol.log").read_text() == f"scontrol requeue {allocation['SLURM_JOB_ID']}\n"


def test_the_nodes_that_slurm_is_asked_for_run_one_task_each() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SBATCH.read_text(), flags=re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("B:USR1@"), "to the script, which traps it"
    assert "#SBATCH --requeue" in SBATCH.read_text()


# ── SkyPilot ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "mode, replica, expected",
    [
        ("train", None, ["python", "jobs/pipeline.py"]),
        ("serve", None, ["aft-ray", "serve"]),
        ("serve", "1", ["aft-ray", "serve"]),
    ],
)
def test_skypilot_runs_the_line_or_the_endpoint_on_every_node(
    allocation: dict[str, str], tmp_path: Path, mode: str, replica: str | None, expected: list[str]
) -> None:
    (tmp_path / "aft_ray").mkdir()
    (tmp_path / "deploy").rename(tmp_path / "aft_ray" / "deploy")
    of_sky = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    of_sky |= {"SKYPILOT_SERVE_REPLICA_ID": replica} if replica else {}
    chosen = {**sky()["envs"], "MODE": mode, "RUN_DIR": "s3://b/x"}
    environment = {**allocation, **of_sky, **chosen, "HOME": str(tmp_path), "RAY_PORT": "", "RAY_TMPDIR": ""}
    subprocess.run(["bash", "-c", sky()["run"]], env=environment, check=True, timeout=60)
    (call,) = (json.loads(line) for line in (tmp_path / "aft_ray" / "calls.jsonl").read_text().splitlines())
    public = ["--set", "serving.host=0.0.0.0", "--set", "serving.api_keys_env=AFT_RAY_API_KEYS"] if replica else []
    settings = ["--config", "configs/llama_8b_gpu.yaml", "--set", "run.dir=s3://b/x", *public]
    assert call["arguments"] == ["1", "2", "10.0.0.7", *expected, *settings]


def test_skypilot_knows_every_field() -> None:
    task, schema = sky(), json.loads((DEPLOY.parent / "tests" / "deploy" / "schemas" / "skypilot.json").read_text())
    for part in ("task", "resources", "service"):
        value = task if part == "task" else task[part]
        errors = list(Draft7Validator(schema[part]).iter_errors(value))
        assert [f"{part} {error.json_path}: {error.message}" for error in errors] == []
        assert list(Draft7Validator(schema[part]).iter_errors({**value, "no such field": 1}))


def test_skypilot_nodes_get_files_that_are_there_and_no_secret_by_value() -> None:
    task = sky()
    local = [path for path in task["file_mounts"].values() if not path.startswith("~")]
    assert all((ROOT / path).exists() for path in local)
    assert task["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "secrets" not in task
    assert not [name for name in task["envs"] if re.search(r"TOKEN|KEY|SECRET", name)]


# ── Ray over hosts ────────────────────────────────────────────────────────────────────────────────────────────────────

COUNT = """
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
there = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(lambda: ray.util.get_node_ip_address())
print("HOSTS", len(hosts), "RAN ON", len({ray.get(there.remote()) for _ in range(8)}))
raise SystemExit(3)
"""


@pytest.mark.soak
@needs_hosts
def test_a_command_runs_on_the_cluster_of_all_nodes_which_ends_with_it() -> None:
    flags = {"RAY_START_FLAGS": "--num-cpus=1 --object-store-memory=80000000", "RAY_WAIT_S": "90"}
    script, count = str(DEPLOY / "with_ray.sh"), [sys.executable, "-c", COUNT]
    with hosts(2) as cluster:
        head = cluster.address(0)
        without = cluster.run(0, [script, "0", "2", head, *count], env=flags, check=False)
        assert without.returncode == 2
        assert "run 'ray get-auth-token --generate'" in without.stderr
        for host in range(2):
            (cluster.home(host) / ".ray").mkdir()
            (cluster.home(host) / ".ray" / "auth_token").write_text("f" * 64)
        worker = cluster.start(
            1, [script, "1", "2", head], env={**flags, "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        )
        done = cluster.run(0, [script, "0", "2", head, *count], env=flags, check=False, timeout_s=180)
        assert "HOSTS 2 RAN ON 2" in done.stdout, done.stdout + done.stderr
        assert done.returncode == 3, "the command's own"
        assert worker.wait(timeout=90) == 0, "a node that outlives its head has not failed"
        with pytest.raises(AssertionError):
            cluster.run(1, ["bash", "-c", f": > /dev/tcp/{head}/{PORT}"], timeout_s=20)
