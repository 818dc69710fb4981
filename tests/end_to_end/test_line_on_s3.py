"""A run whose folder lies on object storage: every step, two kills, the report, and places that are refused.

All of it on S3; on Google's storage data and training.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from aft_ray.runs import RESOLVED, read_manifest
from aft_ray.storage import Folder, list_files, local_copy
from aft_ray.training.metrics import HELD_OUT, METRICS
from tests.command_line import ROOT, aft_ray
from tests.training.tiny import ANSWER, WORDS, write_model

SHORT = {"temperature": 1.0, "max_tokens": 8}
PLAN = {"num_proposals": 2, "num_layers": 1, "proposal": SHORT, "final": SHORT}
NUM_STEPS = 40
KEPT = "checkpoint_manager_snapshot.json"
"""Where Ray Train lists the checkpoints that are complete."""


def write_config(folder: Path, run_dir: str, **sections: object) -> Path:
    draw = random.Random(0)
    prompts = [{"prompt": " ".join(draw.choices(WORDS, k=9)), "reference": ANSWER} for _ in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = {
        "run": {"dir": run_dir},
        "engine": {"type": "scripted"},
        "prompts": {"source": str(folder / "prompts.jsonl"), "held_out": 4, "rows_per_shard": 4},
        "proposals": {"num_per_prompt": 2, "sampling": SHORT},
        "scores": {"scorer": "length"},
        "selection": {"num_proposals": 2},
        "targets": {"source": "reference"},
        "evaluation": {"plan": PLAN},
        "serving": {"plan": PLAN},
        **sections,
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start the line in a process of its own whose working directory is empty, and must stay so."""
    (folder / "empty").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "aft_ray", "run", "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AFT_RAY_CACHE": str(folder / "cache")}
    log = (folder / "run.log").open("ab")
    return subprocess.Popen(command, cwd=folder / "empty", env=environment, stdout=log, stderr=log)


def kill_when(holds: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    """Kill the driver and its cluster when the condition holds."""
    limit = time.monotonic() + 900
    while not holds():
        assert driver.poll() is None and time.monotonic() < limit, log.read_text()
        time.sleep(0.05)
    for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
        process.kill()
    driver.wait(60)


@pytest.mark.soak
@pytest.mark.timeout(2700)
def test_every_step_works_on_s3_and_goes_on_after_kills(bucket: str, tmp_path: Path) -> None:
    run = Folder.at(f"{bucket}/line/run")
    model = write_model(tmp_path / "model", window=1024)
    config = write_config(
        tmp_path,
        run.location,
        engine={"type": "transformers", "model": str(model), "max_model_len": 1024, "dtype": "float32"},
        training_set={"max_length": 1024},
        training={
            "num_workers": 2,
            "batch_size_per_worker": 2,
            "learning_rate": 2e-2,
            "num_epochs": NUM_STEPS // 4,
            "save_steps": 10,
            "eval_steps": NUM_STEPS // 2,
            "load_best_model_at_end": True,
        },
    )
    log = tmp_path / "run.log"
    kill_when(lambda: bool(run.child("proposals").names(".parquet")), start(config, tmp_path), log)
    ray_train = run.child("checkpoints/ray_train")
    kill_when(lambda: ray_train.exists(KEPT) and b"aft-" in ray_train.read_bytes(KEPT), start(config, tmp_path), log)
    assert run.child("model").folder_names() == ["sft"]
    last = start(config, tmp_path)
    assert last.wait(1200) == 0, log.read_text()

    for stage in ("prompts", "proposals", "scores", "selection", "targets"):
        manifest = read_manifest(run.child(stage))
        assert manifest is not None and (manifest.status, manifest.rows_out) == ("done", 20)
    ids = [row["prompt_id"] for row in run.child("proposals").rows()]
    assert len(set(ids)) == len(ids) == 20
    assert sorted(run.child("model").folder_names()) == ["aft", "sft"]
    for variant in ("sft", "aft"):
        check_trained(run, variant)
    assert trained_by(run, "sft")["resumed_from_step"] == 0
    assert 0 < trained_by(run, "aft")["resumed_from_step"] < NUM_STEPS
    results = json.loads(run.child("report").read_bytes("results.json"))
    assert [system["system"] for system in results["systems"]] == ["base", "sft", "aft"]
    assert {training["variant"] for training in results["training"]} == {"sft", "aft"}
    assert len(results["perplexities"]) == 4
    assert results["command"] == f"aft-ray run --config {run.location}/{RESOLVED}"
    assert f"report: {run.location}/report/report.html" in log.read_text()
    events = [event["event"] for event in run.json_lines("events.jsonl")]
    assert events.count("resumed") == 2 and events[-1] == "finished"
    assert not [name for name in list_files(Folder.at(f"{bucket}/line")) if "partial" in name or ".probe" in name]
    assert not list((tmp_path / "empty").iterdir()), "nothing was written where the command ran"

    resolved = f"{run.location}/{RESOLVED}"
    reported = aft_ray("report", "--config", resolved)
    assert reported.returncode == 0, reported.stderr
    again = aft_ray("train", "--config", resolved)
    assert again.returncode == 0 and f"done: {2 * NUM_STEPS} steps, sft and aft" in again.stderr, again.stderr


def trained_by(run: Folder, variant: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(run.child(f"model/{variant}").read_bytes("summary.json"))["summary"]
    return summary


def check_trained(run: Folder, variant: str) -> None:
    """Check the files of a trained variant: its adapter, the lines of every step, and the best state."""
    from safetensors.torch import load_file

    model, summary = run.child(f"model/{variant}"), trained_by(run, variant)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(model.names())
    assert summary["adapter_path"] == model.location
    metrics = run.child(f"checkpoints/{variant}")
    assert [row["step"] for row in metrics.json_lines(METRICS)] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in metrics.json_lines(HELD_OUT)] == [NUM_STEPS // 2, NUM_STEPS]
    assert json.loads(metrics.read_bytes("best.json"))["step"] == summary["exported_step"]
    assert not [name for name in list_files(metrics) if "/" in name], "the best state is where it was exported to"
    weights = load_file(local_copy(model.location) / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def run_until(step: str, config: Path, folder: Path) -> None:
    """Run the line to the end of a step in a process of its own."""
    command = [sys.executable, "-m", "aft_ray", "run", "--config", str(config), "--until", step]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AFT_RAY_CACHE": str(folder / "cache")}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_the_data_stages_of_a_scripted_model_work_on_s3(bucket: str, tmp_path: Path, chatml_tokenizer: str) -> None:
    run = Folder.at(f"{bucket}/data/run")
    config = write_config(tmp_path, run.location, engine={"type": "scripted", "tokenizer": chatml_tokenizer})
    run_until("training_set", config, tmp_path)
    manifest = read_manifest(run.child("training_set"))
    assert manifest is not None and manifest.status == "done"
    assert run.child("training_set").exists("card.md")
    assert not (tmp_path / "data").exists()


@pytest.mark.soak
def test_data_and_training_work_on_google_storage(google_bucket: str, tmp_path: Path) -> None:
    run = Folder.at(f"{google_bucket}/line/run")
    model = write_model(tmp_path / "model", window=1024)
    config = write_config(
        tmp_path,
        run.location,
        engine={"type": "transformers", "model": str(model), "max_model_len": 1024, "dtype": "float32"},
        training_set={"max_length": 1024, "variants": ["aft"]},
        training={
            "batch_size_per_worker": 4,
            "deepspeed": "none",
            "num_epochs": NUM_STEPS // 4,
            "save_steps": 10,
            "eval_steps": NUM_STEPS // 2,
            "load_best_model_at_end": True,
        },
    )
    run_until("train", config, tmp_path)
    assert len(run.child("proposals").rows()) == len(run.child("training_set").rows()) == 20
    check_trained(run, "aft")
    assert b"aft-" in run.child("checkpoints/ray_train").read_bytes(KEPT)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://no-such-bucket/run", "this place cannot hold a run: there is no such bucket"),
        ("ftp://host/run", "unknown scheme ftp://"),
        ("s3:/runs/run", "two slashes"),
    ],
    ids=["bucket", "scheme", "slash"],
)
def test_a_place_that_cannot_work_ends_with_one_sentence_and_2(
    bucket: str, tmp_path: Path, place: str, words: str
) -> None:
    config = write_config(tmp_path, place)
    done = aft_ray("run", "--config", str(config))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert words in done.stderr


def test_storage_that_is_down_ends_with_one_sentence_and_2(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = aft_ray("run", "--config", str(write_config(tmp_path, f"{bucket}/run")))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert "the storage does not answer" in done.stderr
