"""SIGKILL at random points, many times, on every data stage: the files end up as those of an uninterrupted run.

Ray is left out here so that there can be a hundred kills: what must survive them is how shards are written.
tests/test_stages.py and tests/test_cluster.py kill drivers, actors and nodes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import Config
from aft_ray.data import proposals, scores, selection, target_scores, targets, training_set
from aft_ray.data.prompts.stage import make_prompts
from aft_ray.runs import Run, begin, read_manifest
from aft_ray.shards import Stage, make_shard
from aft_ray.stage_attempt import Attempt
from aft_ray.stages import _finish, _todo
from aft_ray.storage import Folder
from tests.kills import kill_many_times

STAGES = ("proposals-part-1", "proposals", "scores", "selection", "targets", "target_scores", "training_set")


def run_in(folder: Path, tokenizer: str) -> Run:
    engine = {"type": "scripted", "tokenizer": tokenizer, "seconds_per_token": 0.001, "fail_on": [1]}
    return Run.open(
        Config.model_validate(
            {
                "run": {"dir": str(folder), "max_failure_rate": 0.5},
                "engine": engine,
                "prompts": {"limit": 24, "held_out": 4, "rows_per_shard": 3},
                "proposals": {"num_per_prompt": 6, "proposers": [{"share": 1}, {"share": 2}]},
                "selection": {"num_proposals": 3},
                "targets": {"num_candidates": 3, "filters": {"rejected": False, "max_similarity": 0.9}},
                "training_set": {"variants": ["sft", "aft", "joint"]},
            }
        )
    )


def stages_of(run: Run) -> dict[str, Stage]:
    rooms = (scores, selection, targets, target_scores, training_set)
    made = [*proposals.stages(run), *(room.stage(run) for room in rooms)]
    return {stage.name: stage for stage in made}


async def make_all(stage: Stage) -> None:
    source = read_manifest(stage.source)
    assert source is not None
    manifest = begin(stage.output, stage.name, {**stage.settings, "source": source.fingerprint})
    worker = stage.worker()
    for name in _todo(stage, source, retry_failed=False)[0]:
        await make_shard(stage, name, worker)
    _, there = _todo(stage, source, retry_failed=False)
    _finish(Attempt(stage, manifest, there, [], source.rows_out), 0.5, source)


def work(folder: Path, tokenizer: str, name: str) -> None:
    """Run the stage in the process that is killed."""
    if name == "prompts":
        make_prompts(run_in(folder, tokenizer))
    else:
        asyncio.run(make_all(stages_of(run_in(folder, tokenizer))[name]))


def content(folder: Folder) -> dict[str, list[dict[str, Any]]]:
    return {name: folder.read_table(name).to_pylist() for name in folder.names(".parquet")}


@pytest.mark.parametrize("num_kills", [1, pytest.param(15, marks=pytest.mark.soak)])
def test_a_stage_killed_many_times_ends_with_the_files_of_an_uninterrupted_run(
    num_kills: int, tmp_path: Path, chatml_tokenizer: str
) -> None:
    """`num_kills` is per stage."""
    for name in ("prompts", *STAGES):
        work(tmp_path / "whole", chatml_tokenizer, name)
    num_killed = 0
    for number, name in enumerate(("prompts", *STAGES)):
        arguments = (tmp_path / "killed", chatml_tokenizer, name)
        num_killed += kill_many_times(work, *arguments, num_kills=num_kills, seed=number)
        work(*arguments)
        whole, killed = Folder.at(tmp_path / "whole" / name), Folder.at(tmp_path / "killed" / name)
        assert content(killed) == content(whole), name
        manifests = [read_manifest(folder) for folder in (whole, killed)]
        assert manifests[0] is not None and manifests[1] is not None
        assert manifests[0].rows_out == manifests[1].rows_out > 0
        assert manifests[0].completion_tokens == manifests[1].completion_tokens, "no work is counted twice"
    assert num_killed > num_kills * len(STAGES) / 2
