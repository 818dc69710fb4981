"""The end of a run names commands that use this run: its folder, its settings, its port."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from aft_ray.config import load_config
from aft_ray.pipeline.summary import next_commands
from aft_ray.runs import Run
from tests.command_line import aft_ray


def run_of(folder: Path, **sections: Any) -> Run:
    """Open a run in a folder called `mine`."""
    settings = {"run": {"dir": str(folder / "mine")}, "engine": {"type": "scripted"}, **sections}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return Run.open(load_config(folder / "run.yaml"))


def test_a_run_of_the_packaged_prompts_is_made_again_with_own_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, ask, again = next_commands(run_of(tmp_path, miniature="configs/miniature/quick.yaml"))
    assert serve == f"serve --config {tmp_path}/mine/config.resolved.yaml"
    assert ask.startswith('ask "Name three rivers') and "--base-url" not in ask
    (tmp_path / "my_prompts.jsonl").write_text('{"prompt": "Name a river."}\n')
    named = again.replace("my_prompts.jsonl", str(tmp_path / "my_prompts.jsonl"))
    done = aft_ray("plan", *shlex.split(named)[1:])
    assert done.returncode == 0, done.stderr
    planned = yaml.safe_load(done.stdout)
    assert (planned["run"]["dir"], planned["miniature"]) == (f"{tmp_path}/mine-mine", None)
    monkeypatch.chdir(tmp_path)
    assert next(next_commands(run_of(tmp_path))) == "serve --config mine/config.resolved.yaml"


def test_a_run_of_own_prompts_is_exported_and_the_demo_is_not_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Name a river."}\n')
    prompts = {"source": str(tmp_path / "prompts.jsonl")}
    serve, ask, export = next_commands(run_of(tmp_path, prompts=prompts, serving={"port": 8123}))
    config = f"--config {tmp_path}/mine/config.resolved.yaml"
    assert serve == f"serve {config}"
    assert "--base-url http://127.0.0.1:8123 " in ask
    assert export == f"export {config} --variant aft --output exports/mine-aft"
    assert "quickstart" not in f"{serve} {ask} {export}"
