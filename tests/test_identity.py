"""A folder counts by what it holds: new weights at the same path are new work, the same ones elsewhere are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aft_ray.config import load_config
from aft_ray.data import proposals, scores, targets
from aft_ray.runs import Run
from aft_ray.shards import Stage
from aft_ray.storage import Folder

StageOf = Callable[[Run], Stage]


def of_proposals(run: Run) -> Stage:
    return proposals.stages(run)[0]


of_scores, of_targets = scores.stage, targets.stage


def settings(folder: Path, change: str, of: StageOf) -> Any:
    path = folder / "run.yaml"
    engine = {"type": "transformers", "model": "m/m"}
    path.write_text(yaml.safe_dump({"run": {"dir": str(folder / "run")}, "engine": engine}))
    config = load_config(path, change.split())
    return dict(of(Run(config, Folder.at(config.run.dir))).settings)


@pytest.mark.parametrize(
    ("change", "of"),
    [
        ("engine.model={}", of_proposals),
        ("proposals.adapter={}", of_proposals),
        ("targets.engine.type=transformers targets.engine.model={}", of_targets),
        ("targets.adapter={}", of_targets),
        ("scores.scorer=reward_model scores.reward_model={}", of_scores),
        ("scores.scorer=likelihood scores.likelihood.adapter={}", of_scores),
        ("scores.scorer=likelihood engine.model={}", of_scores),
    ],
    ids=["model", "adapter", "teacher", "teacher-adapter", "reward-model", "likelihood-adapter", "likelihood-model"],
)
@pytest.mark.parametrize("on_s3", [False, True], ids=["here", "s3"])
def test_a_folder_counts_by_what_it_holds(tmp_path: Path, bucket: str, change: str, of: StageOf, on_s3: bool) -> None:
    one, other = (f"{bucket}/{tmp_path.name}/{name}" if on_s3 else str(tmp_path / name) for name in ("one", "other"))
    for place in (one, other):
        Folder.at(place).write_bytes("weights.safetensors", b"first round")

    def found(place: str) -> Any:
        return settings(tmp_path, change.format(place), of)

    before = found(one)
    assert found(other) == before, "the same files elsewhere"
    Folder.at(one).write_bytes("weights.safetensors", b"the second round")
    assert found(one) != before, "other weights at the same path"


def test_names_count_as_names(tmp_path: Path) -> None:
    of_hub = settings(tmp_path, "engine.model=owner/name", of_proposals)
    assert of_hub["engine"]["model"] == "owner/name"
    assert settings(tmp_path, "engine.model=smollm2-135m-instruct", of_proposals)["engine"]["model"]


def test_limits_of_an_engine_are_no_part_of_what_it_made(tmp_path: Path) -> None:
    plain = settings(tmp_path, "engine.type=vllm", of_proposals)
    wider = settings(tmp_path, "engine.type=vllm engine.max_lora_rank=32 engine.max_adapters=8", of_proposals)
    assert plain == wider
