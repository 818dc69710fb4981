"""Disks that are full or read-only: one sentence and an exit code, and a finished run can still be read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aft_ray.cli import guarded
from aft_ray.data.prompts.stage import JsonLines
from aft_ray.errors import StorageError
from aft_ray.storage import Folder
from tests.command_line import ROOT, aft_ray


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The config of a run whose prompts are there."""
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"Name river {n}."}) + "\n" for n in range(4)))
    path = tmp_path / "run.yaml"
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "engine": {"type": "scripted"},
        "prompts": {"source": str(tmp_path / "p.jsonl"), "held_out": 1},
    }
    path.write_text(yaml.safe_dump(settings))
    assert aft_ray("run", "--config", str(path), "--until", "prompts").returncode == 0
    return path


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_a_report_is_written_elsewhere_and_the_run_is_left_alone(config: Path, tmp_path: Path) -> None:
    before = files(tmp_path / "run")
    done = aft_ray("report", "--config", str(config), "--output", str(tmp_path / "elsewhere"))
    assert done.returncode == 2, "the evaluation is missing"
    assert f"the report {tmp_path}/elsewhere/report.html is written, without: " in done.stderr
    assert files(tmp_path / "run") == before
    results = json.loads((tmp_path / "elsewhere" / "results.json").read_bytes())
    assert (results["num_train_prompts"], results["num_held_out_prompts"]) == (3, 1)
    nothing = aft_ray("report", "--config", str(config), "--set", f"run.dir={tmp_path}/none", "--output", str(tmp_path))
    assert nothing.returncode == 4 and "holds no run" in nothing.stderr


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and a mount of its own")
def test_a_finished_run_in_a_read_only_folder_can_be_read(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    aft_ray("report", "--config", str(config), "--output", str(run / "report"))
    mount = f"mount --bind {run} {run} && mount -o remount,ro,bind {run} && exec "
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words, code, expected in (
        (f"report --config {run}/config.resolved.yaml", 0, f"report: {run}/report/report.html"),
        (f"run --config {config} --until prompts", 2, f"{run}: this place cannot hold a run: Read-only file system"),
    ):
        command = ["unshare", "--mount", "sh", "-c", f"{mount}{sys.executable} -m aft_ray {words}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == code, done.stderr
        assert expected in done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_errors_of_the_machine_are_one_sentence_and_others_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    assert guarded(full) == 1
    assert capsys.readouterr().err == "error: /data/x: No space left on device\n"

    def broken() -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor"):
        guarded(broken)


def test_a_list_that_cannot_be_written_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").mkdir()
    (tmp_path / "list.jsonl" / "in the way").touch()
    with (
        pytest.raises(StorageError, match=r"list\.jsonl: cannot be written"),
        JsonLines(Folder.at(tmp_path), "list.jsonl") as lines,
    ):
        lines.write({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["list.jsonl"]
