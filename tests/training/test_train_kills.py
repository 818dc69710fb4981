"""The driver and its Ray are killed, or nodes lost, in the middle of an epoch: training ends as without it.

Dropout is on, so the order of batches, the optimizer, the schedule and the random state must all be picked up again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from aft_ray.storage import Folder
from aft_ray.training.metrics import HELD_OUT, METRICS
from tests.hosts import QUICK
from tests.kills import kill_all

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.soak
NUM_STEPS = 45
SAVE_STEPS = 7  # of three steps per epoch: a checkpoint in the middle of one

TRAIN = """
import json, os, re, sys, threading, time
from pathlib import Path
import psutil, ray
from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.storage import Folder
from aft_ray.training import TrainingJob, train_adapters

folder, model, training_set, *names = sys.argv[1:]
# answers at every step take their time: long enough for a node to be lost meanwhile
config = TrainingConfig(num_workers=2, batch_size_per_worker=4, num_epochs=15, learning_rate=5e-3, save_steps=7,
                        eval_steps=1, bf16=False, deepspeed="zero2", max_failures=1,
                        lora=LoraSettings(rank=4, dropout=0.2))
config = TrainingConfig.model_validate({**config.model_dump(), **json.loads(os.environ.get("SETTINGS", "{}"))})

def train(name, report=None):
    place = Path(folder) / name
    job = TrainingJob(config=config, model=model, training_set=Folder.at(training_set),
                      outputs={"aft": Folder.at(place / "model")}, checkpoints=Folder.at(place / "checkpoints"),
                      seed=7, template_hashes={"aggregator": "h"})
    summary = train_adapters(job, report=report)["aft"]
    (place / "resumed_from").write_text(str(summary.resumed_from_step))
"""
ONE_NODE = """
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
for name in names:
    train(name)
"""
NODES = """
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

small = dict(object_store_memory=80_000_000)
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, **small))
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(3)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
cluster.wait_for_nodes()
place = Path(folder) / names[0] / "checkpoints"
config = config.model_copy(update={"save_steps": 1000})  # so nothing is saved but on notice, and at the end
phases = []

def steps():
    metrics = place / "aft" / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0

def saved():
    kept = place / "ray_train" / "checkpoint_manager_snapshot.json"
    return [int(step) for step in re.findall(r"aft-(\\d+)", kept.read_text() if kept.exists() else "")]

def until(condition):
    while not condition():
        assert training.is_alive(), "the training ended too early"
        time.sleep(0.02)

def at_work(node):
    try:
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return any("RayTrainWorker" in one.name() for one in raylet.children())
    except psutil.Error:  # one of them ended meanwhile
        return False

def lose_nodes():
    until(lambda: steps() >= 5)
    preempted = next(node for node in nodes if at_work(node))
    # as `ray drain-node` does, which takes seconds to start
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(time.time() * 1000) + 2000
    accepted, refusal = GcsClient(address=cluster.address).drain_node(preempted.node_id, reason, "spot", deadline_ms)
    assert accepted, refusal
    until(saved)
    on_notice = saved()[0]
    (Path(folder) / "saved_on_notice").write_text(str(on_notice))
    others = [node for node in nodes if node is not preempted]
    until(lambda: all(at_work(node) for node in others))  # so the old workers are gone
    moved_at, metrics = time.time(), place / "aft" / "metrics.jsonl"
    until(lambda: metrics.stat().st_mtime > moved_at and steps() > on_notice)  # the new ones went on
    cluster.remove_node(others[0], allow_graceful=False)
    until(lambda: "waiting for nodes" in phases)
    cluster.add_node(num_cpus=1, **small)

training = threading.Thread(target=train, args=(names[0], lambda state: phases.append(state.phase)))
training.start()
lose_nodes()  # in the main thread, where a node can be added
training.join()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    (folder / "driver.py").write_text(TRAIN + ONE_NODE)
    (folder / "nodes.py").write_text(TRAIN + NODES)
    return folder


def start(
    folder: Path, model: Path, training_set: Path, *names: str, script: str = "driver.py", **settings: str
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, str(folder / script), str(folder), str(model), str(training_set), *names]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log)


def kill_in_the_middle(process: subprocess.Popen[bytes], folder: Path, name: str) -> None:
    while len(curve_of(folder, name)) < 25:
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.005)
    kill_all(process)
    assert not (folder / name / "model").exists()


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.wait(timeout=900) == 0, (folder / "log.txt").read_text()[-3000:]


def curve_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return Folder.at(folder / name / "checkpoints" / "aft").json_lines(METRICS)


@pytest.fixture(scope="module")
def whole(folder: Path, tiny_model: Path, training_set: Path) -> Path:
    """The folder with "whole", never interrupted, and "killed", whose driver and Ray were killed in the middle."""
    kill_in_the_middle(start(folder, tiny_model, training_set, "killed"), folder, "killed")
    finish(start(folder, tiny_model, training_set, "killed", "whole"), folder)
    return folder


def test_the_driver_and_its_ray_killed_the_same_call_goes_on(whole: Path) -> None:
    assert check_equal_to_whole(whole, "killed") % SAVE_STEPS == 0


@pytest.mark.parametrize("deepspeed", ["none", "zero2", "zero3"])
def test_a_training_by_two_workers_is_finished_by_one(
    deepspeed: str, folder: Path, tiny_model: Path, training_set: Path
) -> None:
    """Without dropout, whose random state each worker has for itself, one worker repeats the steps of two.

    Under ZeRO each of the two has half of the optimizer's state.
    """
    name = f"shrunk-{deepspeed}"
    plain = {"deepspeed": deepspeed, "lora": {"rank": 4}, "eval_steps": None}
    alone = {**plain, "num_workers": 1, "batch_size_per_worker": 8}
    two = start(folder, tiny_model, training_set, name, SETTINGS=json.dumps(plain))
    kill_in_the_middle(two, folder, name)
    by_two = curve_of(folder, name)
    finish(start(folder, tiny_model, training_set, name, SETTINGS=json.dumps(alone)), folder)
    resumed_from, by_both = int((folder / name / "resumed_from").read_text()), curve_of(folder, name)
    assert 0 < resumed_from < len(by_two)
    assert [row["step"] for row in by_both] == list(range(1, NUM_STEPS + 1))
    repeated = slice(resumed_from, len(by_two))
    found = [row["loss"] for row in by_both[repeated]]
    assert found == pytest.approx([row["loss"] for row in by_two[repeated]], rel=1e-4)
    assert [row["tokens"] for row in by_both[repeated]] == [row["tokens"] for row in by_two[repeated]]
    assert json.loads((folder / name / "model" / "summary.json").read_text())["summary"]["world_size"] == 1


def test_a_preempted_node_and_a_lost_one_cost_one_failure_and_the_training_goes_on_elsewhere(
    whole: Path, tiny_model: Path, training_set: Path
) -> None:
    """`max_failures` is 1, so the preemption is not among the failures. The only checkpoint is the one that the workers
    write when the preemption is announced.
    """
    quick = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2", **QUICK}
    finish(start(whole, tiny_model, training_set, "moved", script="nodes.py", **quick), whole)
    assert check_equal_to_whole(whole, "moved") == int((whole / "saved_on_notice").read_text())


def check_equal_to_whole(folder: Path, name: str) -> int:
    """Check curves and adapter against an uninterrupted training; return the step it resumed from."""
    resumed_from = int((folder / name / "resumed_from").read_text())
    assert 0 < resumed_from < NUM_STEPS
    whole, other = curve_of(folder, "whole"), curve_of(folder, name)
    held_out = [Folder.at(folder / one / "checkpoints" / "aft").json_lines(HELD_OUT) for one in ("whole", name)]
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
