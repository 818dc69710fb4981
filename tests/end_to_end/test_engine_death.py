"""The process of a vLLM engine is killed while it writes proposals: its worker builds another, no row is missing."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import psutil
import pytest

from aft_ray.config import Config
from aft_ray.data import proposals
from aft_ray.data.prompts.stage import make_prompts
from aft_ray.runs import Run
from aft_ray.stages import run_stage
from aft_ray.storage import Folder

pytestmark = pytest.mark.soak

NUM_PROMPTS = 48


def config_of(tmp_path: Path, model: Path) -> Config:
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(f'{{"prompt": "Name {n} birds."}}\n' for n in range(NUM_PROMPTS)))
    engine = {"type": "vllm", "model": str(model), "max_model_len": 512, "max_num_seqs": 16}
    return Config.model_validate(
        {
            "run": {"dir": str(tmp_path / "run")},
            "engine": engine,
            "prompts": {"source": str(source), "held_out": 0, "rows_per_shard": 4},
            "proposals": {
                "num_per_prompt": 2,
                "sampling": {"max_tokens": 32},
                "placement": {"num_cpus": 2, "max_shards_in_flight": 2},
            },
            "selection": {"num_proposals": 2},
            "training_set": {"max_length": 512},
        }
    )


def engine_cores() -> list[psutil.Process]:
    """Return the processes of vLLM's engines below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "EngineCore" in process.name() + " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended after it was listed
            continue
    return found


def test_a_killed_engine_costs_the_rows_in_flight_and_nothing_else(
    ray_cluster: None, smollm2: Path, tmp_path: Path
) -> None:
    run = Run.open(config_of(tmp_path, smollm2))
    make_prompts(run)
    output = Folder.at(tmp_path / "run" / "proposals")
    killed = []

    def kill() -> None:
        end = time.monotonic() + 400
        while len(output.names(".parquet")) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        for core in engine_cores():
            core.kill()
            killed.append(core.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    (stage,) = proposals.stages(run)
    manifest = run_stage(stage, max_failure_rate=0)
    killer.join()
    assert len(killed) == 1, "the engine was at work"
    rows = output.rows()
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in stage.source.rows()]
    answers = [proposal for row in rows for proposal in row["proposals"]]
    assert len(answers) == 2 * NUM_PROMPTS
    assert all(answer["text"] and not answer["error"] for answer in answers), "none of them is a broken-off answer"
    assert (manifest.status, manifest.failed, manifest.num_workers) == ("done", {}, 1), "in the same process"
    end = time.monotonic() + 60
    while engine_cores() and time.monotonic() < end:
        time.sleep(0.2)
    assert engine_cores() == [], "engines end with the stage"
