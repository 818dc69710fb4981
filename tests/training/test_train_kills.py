"""The driver and its whole Ray killed in the middle of an epoch: run again, the training ends as if nothing had been.

Dropout is on, so the order of batches, the optimizer, the schedule and the random state must all be picked up again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from aft_ray.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.timeout(1200)
NUM_STEPS = 45
SAVE_STEPS = 7  # of three steps per epoch: a checkpoint in the middle of one

TRAIN = """
import sys
from pathlib import Path
import ray
from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.training import train_adapter

folder, model, training_set, *names = sys.argv[1:]
config = TrainingConfig(num_workers=2, batch_size_per_worker=4, num_epochs=15, learning_rate=5e-3, save_steps=7,
                        eval_steps=1, bf16=False, deepspeed="zero2", max_failures=1,
                        lora=LoraSettings(rank=4, dropout=0.2))

def train(name):
    place = Path(folder) / name
    summary = train_adapter(config=config, model=model, training_set=Path(training_set), variant="aft",
                            output=place / "model", checkpoints=place / "checkpoints", seed=7,
                            template_hashes={"aggregator": "h"})
    (place / "resumed_from").write_text(str(summary.resumed_from_step))
"""
ONE_NODE = """
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
for name in names:
    train(name)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "driver.py").write_text(TRAIN + ONE_NODE)
    return folder


def start(folder: Path, model: Path, training_set: Path, *names: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(folder / "driver.py"), str(folder), str(model), str(training_set), *names]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(timeout=900) == 0, (folder / "log.txt").read_text()[-3000:]


def curve_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_metrics(folder / name / "checkpoints" / "aft" / "metrics.jsonl")


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """The driver first, so that it cannot notice; then raylet, workers and all the rest of its Ray."""
    below = psutil.Process(process.pid).children(recursive=True)
    for victim in [psutil.Process(process.pid), *below]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def whole(folder: Path, tiny_model: Path, training_set: Path) -> Path:
    """The folder with "whole", never interrupted, and "killed", whose driver and Ray were killed in the middle."""
    process = start(folder, tiny_model, training_set, "killed")
    while len(curve_of(folder, "killed")) < 25:
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.005)
    kill_all(process)
    assert not (folder / "killed" / "model").exists()
    finish(start(folder, tiny_model, training_set, "killed", "whole"), folder)
    return folder


def test_the_driver_and_its_ray_killed_the_same_call_goes_on(whole: Path) -> None:
    assert check_equal_to_whole(whole, "killed") % SAVE_STEPS == 0


def check_equal_to_whole(folder: Path, name: str) -> int:
    """The training's curves and its adapter, and that it was interrupted; the step it went on from."""
    resumed_from = int((folder / name / "resumed_from").read_text())
    assert 0 < resumed_from < NUM_STEPS
    whole, other = curve_of(folder, "whole"), curve_of(folder, name)
    held_out = [read_metrics(folder / one / "checkpoints" / "aft" / "held_out.jsonl") for one in ("whole", name)]
    assert [row["perplexity"] for row in held_out[1]] == [
        pytest.approx(row["perplexity"], rel=1e-3) for row in held_out[0]
    ]
    assert [row["step"] for row in other] == list(range(1, NUM_STEPS + 1))
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in whole], rel=1e-4, abs=1e-5)
    adapters = [load_file(folder / one / "model" / "adapter_model.safetensors") for one in ("whole", name)]
    assert adapters[0].keys() == adapters[1].keys()
    for key, tensor in adapters[0].items():
        assert (tensor - adapters[1][key]).abs().max() < 1e-5, key
    return resumed_from
