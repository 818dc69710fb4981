"""Nodes that come from zero and go again: data, training and serving use them, lose one, and end all the same."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aft_ray.shards import Processed
from aft_ray.storage import Folder
from tests.autoscaling import start_autoscaling_ray
from tests.hosts import Hosts, hosts, needs_hosts
from tests.test_stages import WaitsForOthers, source
from tests.training.tiny import examples_of, write_model, write_training_set

pytestmark = [pytest.mark.soak, needs_hosts]

BEGIN = """
import dataclasses, json, sys, threading, time
from functools import partial
from pathlib import Path
import ray
from aft_ray.storage import Folder
from tests.autoscaling import lose, wait, workers

folder = Path(sys.argv[1])
ray.init(log_to_driver=False, logging_level="ERROR")
found = {"before": len(workers())}
"""
END = """
ray.shutdown(); ray.init(log_to_driver=False, logging_level="ERROR")
wait(lambda: not workers())
(folder / "found.json").write_text(json.dumps(found))
"""
STAGE = """
from aft_ray.config import PlacementConfig
from aft_ray.errors import ConfigError
from aft_ray.stages import run_stage
from tests.test_autoscaling import Slow
from tests.test_stages import squares

stage = squares(folder)
found["refused"] = {}
for name, wrong in {"GPUs": {"num_gpus": 2}, "kind": {"accelerator_type": "B200"}, "CPUs": {"num_cpus": 3}}.items():
    try:
        run_stage(dataclasses.replace(stage, placement=PlacementConfig(**wrong)), max_failure_rate=0)
    except ConfigError as error:
        found["refused"][name] = str(error)

def lose_one():
    wait(lambda: len(stage.output.names(".parquet")) >= 3)
    found["most"] = len(workers())
    lose(workers()[-1])

losing = threading.Thread(target=lose_one)
losing.start()
placement = PlacementConfig(num_gpus=1, accelerator_type="L40S", min_actors=1, max_actors=3, max_shards_in_flight=2)
waits = partial(Slow, folder / "pids", 3)
manifest = run_stage(dataclasses.replace(stage, placement=placement, worker=waits), max_failure_rate=0)
losing.join()
found["rows"] = manifest.rows_out
"""
TRAINING = """
from ray.util import placement_group_table
from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.training import TrainingJob, train_adapters

config = TrainingConfig(num_workers=2, cpus_per_worker=2, gpus_per_worker=0, batch_size_per_worker=4, num_epochs=15,
                        save_steps=3, eval_steps=1, bf16=False, deepspeed="none", max_failures=1,
                        lora=LoraSettings(rank=4))
job = TrainingJob(config=config, model=str(folder / "model"), training_set=Folder.at(folder / "training_set"),
                  outputs={"aft": Folder.at(folder / "adapter")}, checkpoints=Folder.at(folder / "checkpoints"),
                  seed=7, template_hashes={"aggregator": "h"})
kept = folder / "checkpoints" / "ray_train" / "checkpoint_manager_snapshot.json"

def lose_one():
    wait(lambda: bool(placement_group_table()))
    found["group"] = [len(group["bundles"]) for group in placement_group_table().values()]
    found["when asked"] = len(workers())
    wait(lambda: kept.exists() and "aft-" in kept.read_text())
    found["at work"] = len(workers())
    lose(workers()[-1])

losing = threading.Thread(target=lose_one)
losing.start()
summary = train_adapters(job)["aft"]
losing.join()
found["resumed from"], found["steps"] = summary.resumed_from_step, summary.num_steps
"""
SERVING = """
import asyncio
import httpx
from ray import serve
from ray.util.state import list_actors
from aft_ray.config import ReplicaConfig, ScriptedEngineConfig, ServingConfig
from aft_ray.inference.plan import Plan
from aft_ray.serving import serve_app, stop

config = ServingConfig(
    engine=ScriptedEngineConfig(seconds_per_token=0.05, num_tokens=20),
    plan=Plan(num_proposals=8, num_layers=1),
    port=0,
    ingress=ReplicaConfig(num_cpus=0.1),
    aggregator=ReplicaConfig(num_cpus=1.5, max_replicas=3, target_samples=6, upscale_delay_s=1, downscale_delay_s=2),
)
url = serve_app(config, name="grows")
found["first"], replies, is_over = len(workers()), [], threading.Event()

def replicas():
    return serve.status().applications["grows"].deployments["Aggregator"].replica_states.get("RUNNING", 0)

def ask(number):
    with httpx.Client(timeout=120) as client:
        while not is_over.is_set():
            body = {"messages": [{"role": "user", "content": f"question {number} {len(replies)}"}]}
            replies.append(client.post(f"{url}/v1/chat/completions", json=body).status_code)

clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
for client in clients:
    client.start()
wait(lambda: replicas() == 3)
found["most"] = len(workers())
ingress = {one.node_id for one in list_actors(filters=[("state", "=", "ALIVE")]) if "Ingress" in one.class_name}
lose(next(node for node in workers() if node["NodeID"] not in ingress))
wait(lambda: replicas() < 3)
wait(lambda: replicas() == 3)
is_over.set()
for client in clients:
    client.join()
found["replies"] = {status: replies.count(status) for status in set(replies)}
wait(lambda: replicas() == 1)
found["shrunk in"] = wait(lambda: len(workers()) <= 2)
stop("grows")
"""


class Slow(WaitsForOthers):
    """A worker that takes its time, so that its node can be lost meanwhile."""

    async def process(self, row: dict[str, Any]) -> Processed:
        await asyncio.sleep(1)
        return await super().process(row)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    """A head without CPUs, to which up to three nodes of 2 CPUs and a GPU come."""
    with hosts(1) as made:
        start_autoscaling_ray(made, num_gpus=1, num_cpus=2, max_workers=3, idle_minutes=0.2)
        yield made


def drive(cluster: Hosts, folder: Path, code: str) -> dict[str, Any]:
    """Run a driver that begins and ends with no nodes, and return what it found."""
    script = folder / "driver.py"
    body = "".join(f"    {line}\n" for line in (BEGIN + code + END).splitlines())
    script.write_text(f"if __name__ == '__main__':\n{body}")
    cluster.run(0, [sys.executable, str(script), str(folder)], timeout_s=900)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found.pop("before") == 0
    return found


def test_a_stage_uses_all_nodes_it_may_and_what_no_type_can_hold_is_refused(cluster: Hosts, tmp_path: Path) -> None:
    source(Folder.at(tmp_path / "numbers"), num_rows=60)
    found = drive(cluster, tmp_path, STAGE)
    assert found["most"] >= 3, "one that is going still counts while another one comes"
    assert found["rows"] == 60
    assert [row["square"] for row in Folder.at(tmp_path / "squares").rows()] == [n * n for n in range(60)]
    offered = "The nodes have: nothing. Nodes that can be added: 2 CPU, 1 GPU, L40S (up to 3)"
    for name, asked in {"GPUs": "1 CPU, 2 GPU", "kind": "1 CPU, B200", "CPUs": "3 CPU"}.items():
        assert (
            f"squares.placement requests {asked} per worker, and no node has that. {offered}" in found["refused"][name]
        )


def test_a_training_asks_for_its_whole_group_at_once_and_goes_on_when_a_node_is_lost(
    cluster: Hosts, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    write_training_set(tmp_path / "training_set", examples_of(model))
    found = drive(cluster, tmp_path, TRAINING)
    assert (found["group"], found["when asked"]) == ([2], 0)
    assert found["at work"] >= 2
    assert 0 < found["resumed from"] < found["steps"] == 45


def test_an_endpoint_grows_by_its_load_answers_all_when_a_node_is_lost_and_shrinks(
    cluster: Hosts, tmp_path: Path
) -> None:
    found = drive(cluster, tmp_path, SERVING)
    assert found["first"] == 1 and found["most"] >= 3
    assert set(found["replies"]) == {"200"} and found["replies"]["200"] > 20
