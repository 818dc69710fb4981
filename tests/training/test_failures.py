"""Lack of memory, a full disk or a worker that keeps dying ends in one sentence that says what to change.

The loss that is not a number is in test_training_modes.py, among the other trainings.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.errors import TrainingFailed
from aft_ray.training import TrainingJob, train_adapters
from aft_ray.training.metrics import read_metrics
from tests.kills import kill_a_train_worker, when

pytestmark = pytest.mark.soak


def train(config: dict[str, Any], model: Path, training_set: Path, folder: Path) -> None:
    job = TrainingJob(
        config=TrainingConfig.model_validate({"bf16": False, "max_failures": 0, **config}),
        model=str(model),
        training_set=training_set,
        outputs={"aft": folder / "model"},
        checkpoints=folder / "checkpoints",
        seed=1,
    )
    train_adapters(job)


def test_memory_that_no_machine_has(ray_cluster: None, tiny_model: Path, training_set: Path, tmp_path: Path) -> None:
    config = {"lora": LoraSettings(rank=10**11)}  # 12 TiB for the first matrix
    with pytest.raises(TrainingFailed, match=r"ran out of memory: lower training\.batch_size_per_worker") as failed:
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
    metrics = tmp_path / "checkpoints" / "aft" / "metrics.jsonl"
    killer = threading.Thread(target=when, args=(lambda: bool(read_metrics(metrics)), kill_a_train_worker))
    killer.start()
    with pytest.raises(
        TrainingFailed, match=r"a training worker died more than training\.max_failures 0 times"
    ) as failed:
        train({"num_epochs": 1000}, tiny_model, training_set, tmp_path)
    killer.join(timeout=5)
    assert "Run again to continue from the last checkpoint" in str(failed.value)
    assert "\n" not in str(failed.value)
