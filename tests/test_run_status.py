"""`aft-ray status` over the folder of a run: what is done, running, stopped, failed or waiting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from aft_ray.config import load_config
from aft_ray.pipeline import ledger
from aft_ray.pipeline.estimate import estimate
from aft_ray.run_lock import RunLock
from aft_ray.runs import Manifest, Run, write_manifest
from aft_ray.storage import Folder
from tests.command_line import aft_ray


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that stands in the middle of its scores."""
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"run": {"dir": str(tmp_path / "run")}, "engine": {"type": "scripted"}})
    )
    run = Run.open(load_config(tmp_path / "run.yaml"))
    for stage in ("prompts", "proposals"):
        run.event("started", step=stage)
        manifest = Manifest(stage=stage, status="done", fingerprint="", settings={}, rows_in=40, rows_out=40)
        write_manifest(run.folder.child(stage), manifest)
        run.event("finished", step=stage)
    run.event("started", step="scores")
    half = Manifest(
        stage="scores", status="running", fingerprint="", settings={}, rows_in=16, rows_out=14,
        failed={"EngineError": 2}, completion_tokens=800, busy_seconds=8.0,
    )  # fmt: skip
    write_manifest(run.folder.child("scores"), half)
    return run


def lines(place: str) -> dict[str, str]:
    """Return what `aft-ray status` says of every step."""
    done = aft_ray("status", place)
    assert done.returncode == 0, done.stderr
    return {
        line[:22].strip(): re.sub(r" +", " ", line[22:]).strip() for line in done.stdout.split("\n\n")[0].splitlines()
    }


def test_a_run_under_way(run: Run) -> None:
    with RunLock(run.folder):
        said = lines(run.folder.location)
        assert re.search(r"at work: pid \d+ on ", aft_ray("status", run.folder.location).stdout)
    assert said["prompts"] == "done 40 rows"
    assert said["scores"] == "running 16 of 40 rows, 2 failed, 800 tokens, 2 rows/s, 100 tok/s, 12 s left"
    assert said["targets"] == said["train sft"] == said["report"] == "waiting"
    assert "target_scores" not in said and "miniature" not in said, "this run has no such steps"


def test_without_a_command_at_work_nothing_is_running(run: Run) -> None:
    assert lines(run.folder.location)["scores"] == "stopped 16 of 40 rows, 2 failed, 800 tokens, 2 rows/s, 100 tok/s"
    assert "no command is at work on it" in aft_ray("status", run.folder.location).stdout


def test_what_failed_says_why(run: Run) -> None:
    run.event("failed", step="scores", error="TooManyFailures", message="scores: 9 of 40 rows failed")
    done = aft_ray("status", run.folder.location)
    assert re.search(r"^scores +failed ", done.stdout, re.MULTILINE)
    assert "TooManyFailures: scores: 9 of 40 rows failed" in done.stdout


def test_a_training_under_way_names_its_step(run: Run) -> None:
    run.event("started", step="train")
    run.event("training", variant="sft", num_steps=10)
    rows = [{"step": n + 1, "loss": 2.0 - n / 10, "tokens": 300, "seconds": 1.5} for n in range(4)]
    Folder.at(run.folder.location).child("checkpoints/sft").write_bytes(
        "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
    )
    with RunLock(run.folder):
        said = lines(run.folder.location)
    assert said["train sft"] == "running step 4 of 10, loss 1.700, 1.5 s a step, 200 tok/s, 9 s left"


def test_the_ledger_has_what_was_spent_beside_its_estimate(run: Run) -> None:
    spent = Manifest(
        stage="proposals", status="done", fingerprint="", settings={}, rows_in=40, rows_out=40, prompt_tokens=4000,
        completion_tokens=16000, worker_seconds=1800.0, gpus_per_worker=2.0, cost_usd=0.25,
    )  # fmt: skip
    write_manifest(run.folder.child("proposals"), spent)
    settings = ["engine={type: vllm, model: owner/base-8B}", f"run.dir={run.folder.location}", "run.usd_per_gpu_hour=3"]
    config = load_config(f"{run.folder.location}/config.resolved.yaml", settings)
    one, other = ledger.spent(run.folder, config)
    assert (one.step, one.tokens, one.gpu_hours, one.usd) == ("proposals", 20000, 1.0, 3.25)
    assert (other.step, other.tokens, other.usd) == ("scores", 800, 0.0)
    planned = ledger.estimated(run.folder, config)["proposals"]
    [stated] = [step for step in estimate(config, 40) if step.step == "proposals"]
    assert (planned.gpu_hours, planned.usd) == (stated.gpu_hours, stated.usd)


def test_the_ledger_is_printed_with_the_status(run: Run) -> None:
    said = aft_ray("status", run.folder.location).stdout
    assert re.search(r"^scores +800 +0.00 +0.00 +– +–$", said, re.MULTILINE), said


NOBODY = ("--address", "http://127.0.0.1:9")


def test_a_mistyped_folder_is_no_matter_of_the_job_server(tmp_path: Path) -> None:
    for place in ("foo", str(tmp_path / "foo")):
        done = aft_ray("status", place, *NOBODY)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"error: {place}: there is no such run folder" in done.stderr
    assert "If you mean a job: its id is raysubmit_ and 16 letters" in aft_ray("status", "foo", *NOBODY).stderr


def test_an_incomplete_id_of_a_job_is_named_as_such() -> None:
    assert "this is no complete id of a job. An id is" in aft_ray("status", "raysubmit_4qTr", *NOBODY).stderr
    whole = aft_ray("status", "raysubmit_4qTrAbCd12345678", *NOBODY)
    assert (whole.returncode, "folder" in whole.stderr) == (2, False)
    assert "the job server http://127.0.0.1:9 does not answer" in whole.stderr


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    done = aft_ray("status", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds no run" in done.stderr
