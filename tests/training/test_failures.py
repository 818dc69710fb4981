"""What ends a training ends it in one sentence that says what to change, and at once where a restart cannot help.

The loss that is not a number is in test_training_modes.py, among the other trainings.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.errors import ConfigError, TrainingFailed
from aft_ray.storage import Folder
from aft_ray.training import TrainingJob, train_adapters
from aft_ray.training.metrics import METRICS
from tests.hosts import QUICK
from tests.kills import kill_a_train_worker, when

pytestmark = pytest.mark.soak


def train(config: dict[str, Any], model: Path, training_set: Path, folder: Path) -> None:
    job = TrainingJob(
        config=TrainingConfig.model_validate({"bf16": False, "max_failures": 0, **config}),
        model=str(model),
        training_set=Folder.at(training_set),
        outputs={"aft": Folder.at(folder / "model")},
        checkpoints=Folder.at(folder / "checkpoints"),
        seed=1,
    )
    train_adapters(job)


def test_memory_that_no_machine_has(ray_cluster: None, tiny_model: Path, training_set: Path, tmp_path: Path) -> None:
    config = {"lora": LoraSettings(rank=10**11)}  # 12 TiB for the first matrix
    with pytest.raises(
        TrainingFailed, match=r"ran out of memory: run the same command with --set training\.batch_size_per_worker=2"
    ) as failed:
        train(config, tiny_model, training_set, tmp_path)
    assert "\n" not in str(failed.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mounting, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(ray_cluster: None, tiny_model: Path, training_set: Path, small_disk: Path) -> None:
    config = {"save_steps": 1, "lora": LoraSettings(rank=64)}  # one checkpoint is 1 MiB
    with pytest.raises(TrainingFailed, match=r"the disk is full: checkpoints go to <run\.dir>/checkpoints") as failed:
        train(config, tiny_model, training_set, small_disk)
    assert "\n" not in str(failed.value)


def test_a_worker_that_dies_more_often_than_is_allowed(
    ray_cluster: None, tiny_model: Path, training_set: Path, tmp_path: Path
) -> None:
    checkpoints = Folder.at(tmp_path / "checkpoints" / "aft")
    killer = threading.Thread(target=when, args=(lambda: bool(checkpoints.json_lines(METRICS)), kill_a_train_worker))
    killer.start()
    with pytest.raises(
        TrainingFailed, match=r"a training worker died more than training\.max_failures 0 times"
    ) as failed:
        train({"num_epochs": 1000}, tiny_model, training_set, tmp_path)
    killer.join(timeout=5)
    assert "Run again to continue from the last checkpoint" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_model_that_cannot_be_loaded_ends_the_training_at_once(
    ray_cluster: None, training_set: Path, tmp_path: Path
) -> None:
    """If the workers were started again, the last failure would come as TrainingFailed."""
    model = write_model(tmp_path / "base")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model .*base cannot be loaded on a training worker: ") as failed:
        train({"max_failures": 3}, model, training_set, tmp_path)
    assert "\n" not in str(failed.value)


TRAIN = """
import sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.storage import Folder
from aft_ray.training import TrainingJob, train_adapters

folder, model, training_set = sys.argv[1:]
checkpoints = Folder.at(folder).child("checkpoints")

def train(**settings):
    job = TrainingJob(config=TrainingConfig(bf16=False, **settings), model=model, seed=1, checkpoints=checkpoints,
                      training_set=Folder.at(training_set), outputs={"aft": Folder.at(folder).child("model")})
    try:
        train_adapters(job)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""
ONE_GPU = """
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
train(gpus_per_worker=1)
"""
A_LOST_NODE = """
small = dict(object_store_memory=80_000_000)
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, **small))
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
cluster.wait_for_nodes()
training = threading.Thread(target=train, kwargs=dict(num_workers=2, num_epochs=1000, max_wait_s=0))
training.start()
while not checkpoints.child("aft").json_lines("metrics.jsonl"):
    assert training.is_alive()
    time.sleep(0.1)
cluster.remove_node(nodes[0], allow_graceful=False)
training.join()
ray.shutdown()  # a driver whose raylet goes first ends with 1
cluster.shutdown()
"""


def said(script: str, model: Path, training_set: Path, folder: Path, **settings: str) -> str:
    """Run a script with a Ray of its own and return what it prints."""
    here = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(here), **settings}
    command = [sys.executable, "-c", TRAIN + script, str(folder), str(model), str(training_set)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_workers_without_the_build_for_gpus_are_named(tiny_model: Path, training_set: Path, tmp_path: Path) -> None:
    import torch

    if torch.distributed.is_nccl_available():
        pytest.skip("this is the build for GPUs")
    text = said(ONE_GPU, tiny_model, training_set, tmp_path)
    assert "TrainingFailed: training.gpus_per_worker is 1, but PyTorch on the workers is the build for CPUs" in text


def test_a_training_does_not_wait_for_nodes_that_cannot_come(
    tiny_model: Path, training_set: Path, tmp_path: Path
) -> None:
    quick = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3", **QUICK}
    text = said(A_LOST_NODE, tiny_model, training_set, tmp_path, **quick)
    assert "ConfigError: training requests 1 CPU per worker for 2 workers at a time, and the cluster holds 1." in text
