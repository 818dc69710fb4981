"""A run as a job on four hosts that share an S3 server and nothing else: a head without CPUs, and three workers.

It loses a host in every step that has workers, and ends with the rows of a run that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command_line import ROOT
from tests.hosts import QUICK, Hosts, hosts, needs_hosts
from tests.training.tiny import ANSWER, WORDS, write_model

pytestmark = [pytest.mark.soak, needs_hosts, pytest.mark.timeout(1500)]

SHORT = {"temperature": 1.0, "max_tokens": 8}
PLAN = {"num_proposals": 2, "num_layers": 1, "proposal": SHORT, "final": SHORT}
STEPS = ("proposals", "targets", "train", "evaluate")
"""Those that have workers at this size; the driver makes the others."""
PREPARE = """
import boto3
boto3.client("s3").create_bucket(Bucket="runs")
"""
WATCH = """
import sys, time
import ray
from ray.util.state import list_actors
from aft_ray.runs import read_manifest
from aft_ray.storage import Folder, list_files

run = Folder.at("s3://runs/lossy")
ray.init(log_to_driver=False, logging_level="ERROR")

def has_begun(step):
    if step == "train":
        return any("checkpoint_manager_snapshot" in name for name in list_files(run.child("checkpoints")))
    if step == "evaluate":
        return run.child("model/aft").exists("adapter_model.safetensors")
    manifest = read_manifest(run.child(step))
    return manifest is not None and manifest.status == "running"

for step in sys.argv[1:]:
    workers = {"train": "RayTrainWorker", "evaluate": "ServeReplica"}.get(step, "MapWorker")
    at_work = set()
    while not at_work:
        time.sleep(0.1)
        if has_begun(step):
            alive = list_actors(filters=[("state", "=", "ALIVE")])
            at_work = {one.node_id for one in alive if workers in one.class_name}
    lost = next(node for node in ray.nodes() if node["NodeID"] in at_work)
    print("LOSE", step, lost["NodeManagerAddress"], flush=True)
    while any(node["Alive"] and node["NodeID"] == lost["NodeID"] for node in ray.nodes()):
        time.sleep(0.1)
"""
COPY = """
import sys
from pathlib import Path
from aft_ray.storage import Folder, list_files

for name in list_files(Folder.at("s3://runs")):
    folder, _, file = name.rpartition("/")
    place = Path(sys.argv[1]) / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / file).write_bytes(Folder.at(f"s3://runs/{folder}").read_bytes(file))
import ray
from ray import serve
ray.init(log_to_driver=False)
print(list(serve.status().applications))
"""


def write_configs(folder: Path) -> None:
    """Write a run of a tiny model that takes every step, here and on S3."""
    model = write_model(folder / "model", window=1024)
    draw = random.Random(0)
    prompts = [{"prompt": " ".join(draw.choices(WORDS, k=9)), "reference": ANSWER} for _ in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    one_at_a_time = {"max_shards_in_flight": 1}
    config: dict[str, Any] = {
        "run": {"dir": str(folder / "whole")},
        "engine": {"type": "transformers", "model": str(model), "max_model_len": 1024, "dtype": "float32"},
        "prompts": {"source": str(folder / "prompts.jsonl"), "held_out": 4, "rows_per_shard": 2},
        "proposals": {"num_per_prompt": 2, "sampling": SHORT, "placement": one_at_a_time},
        "scores": {"scorer": "length"},
        "selection": {"num_proposals": 2},
        "targets": {
            "engine": {"type": "scripted", "tokenizer": str(model), "seconds_per_token": 0.1, "answers": [ANSWER]},
            "filters": {"finish_reasons": ["stop", "length"], "rejected": False},
            "placement": one_at_a_time,
        },
        "training_set": {"max_length": 1024, "variants": ["aft"]},
        "training": {
            "num_workers": 2, "deepspeed": "none", "batch_size_per_worker": 2, "learning_rate": 2e-2,
            "num_epochs": 6, "save_steps": 2, "eval_steps": 1,
        },
        "evaluation": {"plan": PLAN},
        "serving": {"plan": PLAN},
    }  # fmt: skip
    (folder / "whole.yaml").write_text(yaml.safe_dump(config))
    (folder / "lossy.yaml").write_text(yaml.safe_dump({"base": "whole.yaml", "run": {"dir": "s3://runs/lossy"}}))


@pytest.fixture
def cluster() -> Iterator[tuple[Hosts, dict[str, str]]]:
    """Four hosts with Ray and an S3 server on the head, and the environment in which they find it."""
    pytest.importorskip("moto", reason="make storage installs the S3 server")
    with hosts(4) as made:
        storage = {
            "AWS_ENDPOINT_URL": f"http://{made.address(0)}:5000",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "no secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **QUICK,
        }
        made.start(0, [sys.executable, "-m", "moto.server", "-H", made.address(0)], log=made.folder / "s3.log")
        made.start_ray(num_cpus=(0, 2, 2, 2), env=storage)
        made.run(0, [sys.executable, "-c", PREPARE], env=storage)
        yield made, storage


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    files = sorted((run / stage).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def make_whole(folder: Path) -> Path:
    """Make the data of a run here, undisturbed, and return its folder."""
    command = [sys.executable, "-m", "aft_ray", "run", "--config", str(folder / "whole.yaml")]
    done = subprocess.run(
        [*command, "--until", "training_set"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def test_a_job_takes_every_step_and_a_lost_host_in_each_changes_nothing(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_configs(tmp_path)
    whole = make_whole(tmp_path)
    made, storage = request.getfixturevalue("cluster")  # now, so that the two do not share the machine
    watch = made.start(0, [sys.executable, "-c", WATCH, *STEPS], env=storage)
    submit = [sys.executable, "-m", "aft_ray", "submit", "pipeline", "--address", "http://127.0.0.1:8265"]
    submit += ["--config", str(tmp_path / "lossy.yaml")]
    job = made.start(0, submit, env=storage, log=tmp_path / "job.log")
    threading.Thread(target=lambda: (job.wait(), watch.kill())).start()  # which would wait for ever
    lost = []
    assert watch.stdout is not None
    for line in watch.stdout:
        if not line.startswith("LOSE "):
            continue  # Ray's own
        _, step, address = line.split()
        [host] = [host for host in range(made.num_hosts) if made.address(host) == address]
        made.kill(host)
        made.start_node(host, 2, env=storage)
        lost.append(step)
    said = (tmp_path / "job.log").read_text
    assert (job.wait(300), lost) == (0, list(STEPS)), said()[-6000:]
    left = made.run(0, [sys.executable, "-c", COPY, str(tmp_path / "copy")], env=storage).stdout
    assert "[]" in left, "the run has ended its applications"
    lossy = tmp_path / "copy" / "lossy"
    for stage in ("prompts", "proposals", "scores", "selection", "targets"):
        assert len(rows_of(whole, stage)) == 16
        assert rows_of(lossy, stage) == rows_of(whole, stage), stage
    assert rows_of(lossy, "training_set") == rows_of(whole, "training_set")
    report = json.loads((lossy / "report" / "results.json").read_text())
    assert [system["system"] for system in report["systems"]] == ["base", "aft"]
    assert [system["num_prompts"] for system in report["systems"]] == [4, 4]
    assert {one["nats_per_token"]["num"] for one in report["perplexities"]} == {4}
    assert report["notes"] == []
    summary = json.loads((lossy / "model" / "aft" / "summary.json").read_text())["summary"]
    assert summary["resumed_from_step"] > 0
    assert (lossy / "model" / "aft" / "adapter_model.safetensors").stat().st_size > 1000
