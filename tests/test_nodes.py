"""Every node of a cluster says before the first token which variables it lacks and whether it sees the run's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.hosts import Hosts, hosts, needs_hosts

pytestmark = [pytest.mark.soak, needs_hosts]


def write_config(folder: Path) -> Path:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Name {n} birds."}) + "\n" for n in range(4)))
    config = {
        "run": {"dir": str(folder / "run")},
        "engine": {"type": "scripted"},
        "prompts": {"source": str(folder / "prompts.jsonl"), "held_out": 0},
        "proposals": {"num_per_prompt": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def proposals(cluster: Hosts, config: Path, *settings: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the line up to the proposals on the head; return the exit code and what was said."""
    command = [sys.executable, "-m", "aft_ray", "run", "--config", str(config), "--until", "proposals"]
    command += [part for setting in settings for part in ("--set", setting)]
    done = cluster.run(0, command, env=env, check=False)
    return done.returncode, done.stderr


def test_what_a_node_lacks_is_said_before_the_first_token(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with hosts(2) as cluster:
        cluster.start_ray(num_cpus=(0, 2))
        needs = "run.environment=[TOKEN_OF_THE_TEST]"
        code, said = proposals(cluster, config, needs, env={"TOKEN_OF_THE_TEST": "secret"})
        assert code == 2, said
        assert "environment variables are missing: TOKEN_OF_THE_TEST on " in said
        assert cluster.address(1) in said.splitlines()[-1]
        assert "secret" not in said

        (tmp_path / "mounted.env").write_text("TOKEN_OF_THE_TEST=secret\n")
        code, said = proposals(cluster, config, needs, f"run.environment_file={tmp_path / 'mounted.env'}")
        assert code == 0, said

        code, said = proposals(cluster, config, "run.dir=~/run")  # a home of its own on each host
        assert code == 2, said
        last = said.strip().splitlines()[-1]
        assert cluster.address(1) in last
        assert "does not see what the driver writes there: use a file system that all nodes share, or a URL" in last
