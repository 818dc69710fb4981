"""A run on object storage is trained there: checkpoints, metrics and adapter, also by a driver that is killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import ANSWER, WORDS, write_model

from aft_ray.storage import Folder, list_files, local_copy
from aft_ray.training.metrics import HELD_OUT, METRICS
from tests.kills import kill_all
from tests.object_storage import s3_server

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent.parent
NUM_STEPS = 180
BEST = {"load_best_model_at_end": True}
KEPT = "checkpoint_manager_snapshot.json"
"""Where Ray Train lists the checkpoints that are complete."""


def test_a_training_on_object_storage_goes_on_after_a_kill(tmp_path: Path) -> None:
    with s3_server() as bucket:
        run = Folder.at(f"{bucket}/run")
        config = write_config(tmp_path, run.location)
        command = [sys.executable, "-m", "aft_ray", "run", "--until", "train", "--config", str(config)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "AFT_RAY_CACHE": str(tmp_path / "cache")}
        log = (tmp_path / "log.txt").open("wb")
        killed = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        ray_train = run.child("checkpoints/ray_train")
        while not (ray_train.exists(KEPT) and b"aft-" in ray_train.read_bytes(KEPT)):
            assert killed.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
            time.sleep(0.05)
        kill_all(killed)
        assert run.child("model").folder_names() == []

        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        check_trained(run)
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert again.returncode == 0, again.stderr
        assert f"train         done: {NUM_STEPS} steps, aft" in again.stderr
        first_round = run.child("model/aft").location
        settings = {"run.dir": f"{bucket}/second", "training.init_adapter": first_round, "training.num_epochs": "1"}
        options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        second = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
        assert second.returncode == 0, second.stderr
        summary = json.loads(Folder.at(f"{bucket}/second/model/aft").read_bytes("summary.json"))["summary"]
        assert summary["first_loss"] < 1, "it begins with what the first round learnt"


def write_config(folder: Path, run_dir: str) -> Path:
    model = write_model(folder / "model", window=1024)
    draw = random.Random(0)
    prompts = [{"prompt": " ".join(draw.choices(WORDS, k=9)), "reference": ANSWER} for _ in range(14)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    short = {"temperature": 1.0, "max_tokens": 8}
    config = {
        "run": {"dir": run_dir},
        "engine": {"type": "transformers", "model": str(model), "max_model_len": 1024, "dtype": "float32"},
        "prompts": {"source": str(folder / "prompts.jsonl"), "held_out": 2},
        "proposals": {"num_per_prompt": 2, "sampling": short},
        "scores": {"scorer": "length"},
        "selection": {"num_proposals": 2},
        "targets": {"source": "reference"},
        "training_set": {"max_length": 1024, "variants": ["aft"]},
        "training": {"num_epochs": 60, "save_steps": 10, "eval_steps": 90, "deepspeed": "none", **BEST},
        "evaluation": {"plan": {"num_proposals": 2, "num_layers": 1, "proposal": short, "final": short}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def check_trained(run: Folder) -> None:
    files = list_files(run.child("model"))
    assert {"aft/adapter_model.safetensors", "aft/adapter_config.json", "aft/summary.json"} <= files.keys()
    assert all(name.startswith("aft/") for name in files)
    summary = json.loads(run.child("model/aft").read_bytes("summary.json"))["summary"]
    assert 0 < summary["resumed_from_step"] < NUM_STEPS
    assert summary["adapter_path"] == run.child("model/aft").location
    metrics = run.child("checkpoints/aft")
    assert [row["step"] for row in metrics.json_lines(METRICS)] == list(range(1, NUM_STEPS + 1))
    assert [row["step"] for row in metrics.json_lines(HELD_OUT)] == [90, 180]
    assert json.loads(metrics.read_bytes("best.json"))["step"] == summary["exported_step"]
    assert not [name for name in list_files(metrics) if "/" in name], "the best state is where it was exported to"
    from safetensors.torch import load_file

    copy = local_copy(run.child("model/aft").location)
    assert all(tensor.isfinite().all() for tensor in load_file(copy / "adapter_model.safetensors").values())
