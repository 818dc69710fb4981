"""`aft-ray run` killed with SIGKILL in every data stage on Ray: actors, the driver, the driver with its cluster."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from aft_ray.data import DATA_STAGES
from aft_ray.runs import read_manifest
from aft_ray.storage import Folder
from tests.data.test_kills import content

pytestmark = pytest.mark.soak

NUM_ROWS, ROWS_PER_SHARD = 48, 2
ONE_AT_A_TIME = {"max_shards_in_flight": 1}


def config_of(folder: Path, tokenizer: str) -> Path:
    folder.mkdir()
    (folder / "p.jsonl").write_text("".join(f'{{"prompt": "Name {n} birds."}}\n' for n in range(NUM_ROWS)))
    engine = {"type": "scripted", "tokenizer": tokenizer, "seconds_per_token": 0.01}
    raw = {
        "run": {"dir": str(folder / "run")},
        "engine": engine,
        "prompts": {"source": str(folder / "p.jsonl"), "held_out": 4, "rows_per_shard": ROWS_PER_SHARD},
        "proposals": {"num_per_prompt": 3, "placement": ONE_AT_A_TIME},
        "scores": {"scorer": "length", "placement": ONE_AT_A_TIME},
        "selection": {"num_proposals": 2, "placement": ONE_AT_A_TIME},
        "targets": {"num_candidates": 2, "placement": ONE_AT_A_TIME},
        "training_set": {"placement": ONE_AT_A_TIME},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def start(config: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aft_ray", "run", "--config", str(config), "--until", "training_set"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_until(holds: Callable[[], bool], driver: subprocess.Popen[bytes], seconds: float = 180) -> None:
    """Until it holds or the driver has ended; an error after `seconds`."""
    limit = time.monotonic() + seconds
    while not holds() and driver.poll() is None:
        assert time.monotonic() < limit, "nothing moves"
        time.sleep(0.01)


def kill_an_actor(driver: subprocess.Popen[bytes]) -> bool:
    """Kill the worker of the stage that is running; whether there was one."""
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                process.kill()
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def kill(driver: subprocess.Popen[bytes], *, cluster_first: bool) -> None:
    """Kill the driver; with `cluster_first` everything that it started before it."""
    started = psutil.Process(driver.pid).children(recursive=True)
    for process in started if cluster_first else []:
        if process.is_running():
            process.kill()
    driver.kill()
    driver.wait()
    for process in psutil.wait_procs(started, timeout=20)[
        1
    ]:  # Ray ends with its driver, but for its agents; leave nothing behind
        process.kill()


def test_killed_in_every_stage_the_run_ends_up_as_an_uninterrupted_one(tmp_path: Path, chatml_tokenizer: str) -> None:
    whole = config_of(tmp_path / "whole", chatml_tokenizer)
    assert start(whole).wait(timeout=300) == 0
    killed = config_of(tmp_path / "killed", chatml_tokenizer)
    draw, num_actors, num_drivers = random.Random(5), 0, 0
    for number, stage in enumerate(DATA_STAGES[1:]):
        folder = Folder.at(tmp_path / "killed" / "run" / stage)
        driver = start(killed)
        try:
            for num_shards in (1, 4):
                wait_until(lambda: len(folder.names(".parquet")) >= num_shards, driver)  # noqa: B023
                time.sleep(draw.random() * 0.1)
                if num_shards == 1 and driver.poll() is None:
                    num_actors += kill_an_actor(driver)
            num_drivers += driver.poll() is None
        finally:
            if driver.poll() is None:
                kill(driver, cluster_first=number % 2 == 0)
    assert num_drivers >= 4
    assert num_actors >= 3
    assert start(killed).wait(timeout=300) == 0
    for stage in DATA_STAGES:
        folders = [Folder.at(tmp_path / name / "run" / stage) for name in ("whole", "killed")]
        assert content(folders[0]) == content(folders[1]), stage
        manifests = [read_manifest(folder) for folder in folders]
        assert manifests[0] is not None and manifests[1] is not None
        assert manifests[0].status == manifests[1].status == "done"
        assert manifests[0].completion_tokens == manifests[1].completion_tokens, "no work is counted twice"
