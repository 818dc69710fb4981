"""A single step refuses to go on from stages that were made from other settings, and writes nothing when it does."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from aft_ray.runs import RESOLVED
from tests.command_line import aft_ray
from tests.data.test_prompts import write_jsonl

SHORT = {"temperature": 0.7, "max_tokens": 8}
LOCAL_MODEL = "training needs a local model"
"""What a training with a scripted engine ends with once it has begun."""


@pytest.fixture(scope="module")
def built(ray_cluster: None, chatml_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose training set is finished; an adapter of the scripted model wrote its targets."""
    folder = tmp_path_factory.mktemp("built")
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    rows = [{"prompt": f"What is {n} and {n}?", "task": "numeric", "reference": str(2 * n)} for n in range(6)]
    evaluation_set = write_jsonl(folder / "evaluation.jsonl", {"prompt": "Something else entirely?"})
    run = {
        "run": {"dir": str(folder / "run")},
        "engine": {"type": "scripted", "tokenizer": chatml_tokenizer, "answers": ["it is 4", "it is 8"]},
        "prompts": {
            "source": write_jsonl(folder / "prompts.jsonl", *rows),
            "held_out": 2,
            "decontaminate": [evaluation_set],
        },
        "proposals": {"num_per_prompt": 2, "sampling": SHORT},
        "selection": {"num_proposals": 2},
        "targets": {"sampling": SHORT, "adapter": str(adapter), "filters": {"rejected": False, "max_similarity": None}},
        "training_set": {"max_length": 2048},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    done = aft_ray("run", "--config", str(folder / "run.yaml"), "--until", "training_set")
    assert done.returncode == 0, done.stderr
    return folder


Step = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def step(built: Path, tmp_path: Path) -> Step:
    """Call a command with changed settings on a copy of the run in `tmp_path`."""
    shutil.copytree(built / "run", tmp_path / "run")

    def call(*command: str, change: str = "") -> CompletedProcess[str]:
        settings = [part for one in (f"run.dir={tmp_path / 'run'}", *change.split()) for part in ("--set", one)]
        return aft_ray(*command, "--config", str(built / "run.yaml"), *settings)

    return call


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file of a folder with the time of its last change."""
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("change", "stage", "words"),
    [
        ("prompts.held_out=1", "prompts", "prompts.held_out: was 2, is 1"),
        ("prompts.decontaminate=[]", "prompts", r"decontaminate: was \['\w+'\], is \[\]"),
        ("proposals.sampling.temperature=0.3", "proposals", "proposals.sampling.temperature: was 0.7, is 0.3"),
        ("scores.scorer=length", "scores", "scores.scorer: was 'auto', is 'length'"),
        ("selection.strategy=random", "selection", "selection.strategy: was '.*', is 'random'"),
        ("targets.num_candidates=3", "targets", "targets.num_candidates: was .*, is 3"),
        ("targets.adapter=null", "targets", r"targets.adapter.*: was .*, is None"),
        ("training_set.max_length=1024", "training_set", "training_set.max_length: was 2048, is 1024"),
    ],
)
def test_a_training_is_refused_where_a_setting_before_it_was_changed(
    change: str, stage: str, words: str, step: Step, tmp_path: Path
) -> None:
    before = content(tmp_path / "run")
    refused = step("train", change=change)
    assert refused.returncode == 4, refused.stderr
    assert re.search(f"error: {tmp_path}/run/{stage} was made from other settings:\n  {words}", refused.stderr)
    assert "Choose another run.dir, or remove this folder and the ones made from it" in refused.stderr
    assert content(tmp_path / "run") == before, "nothing is written, config.resolved.yaml and events.jsonl included"


@pytest.mark.parametrize(
    "command", [("job", "scores"), ("job", "train"), ("evaluate",), ("job", "report")], ids=" ".join
)
def test_every_step_says_what_the_whole_run_says(command: tuple[str, ...], step: Step) -> None:
    change = "proposals.sampling.temperature=0.3"
    single, whole = step(*command, change=change), step("run", change=change)
    assert single.returncode == whole.returncode == 4
    assert single.stderr == whole.stderr[whole.stderr.index("error: ") :]


def test_a_step_goes_on_from_stages_whose_settings_are_the_same(step: Step, tmp_path: Path) -> None:
    assert step("job", "training_set").returncode == 0
    begun = step("train", change="training.learning_rate=0.5 proposals.placement.max_actors=7 run.max_failure_rate=0.5")
    assert (begun.returncode, LOCAL_MODEL in begun.stderr) == (2, True), begun.stderr
    resolved = yaml.safe_load((tmp_path / "run" / RESOLVED).read_text())
    assert resolved["training"]["learning_rate"] == 0.5
