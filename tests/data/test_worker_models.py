"""What each worker of each config of the project loads: one model at most, and the one that its stage is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from aft_ray.config import ScriptedEngineConfig, load_config
from aft_ray.data import DATA_STAGES
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.pipeline.steps import stages_of
from aft_ray.runs import Run
from aft_ray.storage import Folder

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "configs"
SMALL = {"proposals": ["smollm2-135m-instruct"], "targets": ["smollm2-135m-instruct"]}
REWARD, TEACHER = ["sfairXC/FsfairX-LLaMA3-RM-v0.1"], ["Qwen/Qwen2.5-72B-Instruct"]
LLAMA, MISTRAL = ["meta-llama/Llama-3.1-8B"], ["mistralai/Mistral-7B-v0.1"]
LOADED: dict[str, dict[str, list[str]]] = {
    "demo": SMALL,
    "quickstart": SMALL,
    "miniature/method": {"proposals": ["configs/miniature/base"]},
    "miniature/quick": {"proposals": ["configs/miniature/base"]},
    "llama_8b_gpu": {"proposals": LLAMA, "scores": REWARD, "targets": TEACHER},
    "remote_teacher": {"proposals": LLAMA, "scores": REWARD, "targets": ["teacher at an endpoint"]},
    "paper/llama_on_policy": {"proposals": LLAMA, "scores": REWARD, "targets": TEACHER},
    "paper/llama_off_policy": {"scores": REWARD, "targets": TEACHER},
    "paper/mistral_on_policy": {"proposals": MISTRAL, "scores": REWARD, "targets": TEACHER},
    "paper/mistral_off_policy": {"scores": REWARD, "targets": TEACHER},
}
"""The models of every stage that loads one, by config. `miniature/base` makes its model and has no line to run."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, chatml_tokenizer: str) -> list[str]:
    """The models that were loaded; each is a scripted engine, or nothing where it would give scores."""
    models: list[str] = []

    def load(config: Any, *args: Any, **options: Any) -> ScriptedEngine:
        models.append(config.model)
        return ScriptedEngine(ScriptedEngineConfig(tokenizer=chatml_tokenizer))

    def ask(config: Any) -> ScriptedEngine:
        models.append(f"{config.model} at an endpoint")
        return ScriptedEngine(ScriptedEngineConfig())

    def load_scorer(reference: str, *args: Any) -> None:
        models.append(reference)

    monkeypatch.setattr("aft_ray.engines.vllm.VllmEngine", load)
    monkeypatch.setattr("aft_ray.engines.transformers.TransformersEngine", load)
    monkeypatch.setattr("aft_ray.engines.openai.OpenAIEngine", ask)
    monkeypatch.setattr("aft_ray.data.scorers.RewardModel", load_scorer)
    monkeypatch.setattr("aft_ray.data.scorers.VllmRewardModel", load_scorer)
    tokenizer = AutoTokenizer.from_pretrained(chatml_tokenizer)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer)
    return models


def test_every_config_of_the_project_is_listed() -> None:
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert names - {"miniature/base"} == set(LOADED)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] if models is SMALL else []) for name, models in LOADED.items()]
)
def test_a_worker_loads_the_model_of_its_stage_and_no_other(
    name: str, loaded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = Run(load_config(CONFIGS / f"{name}.yaml"), Folder.at(tmp_path))
    found = {}
    for stage in (stage for step in DATA_STAGES[1:] for stage in stages_of(run, step)):
        loaded.clear()
        stage.worker()
        found[stage.name] = list(loaded)
    assert {stage: models for stage, models in found.items() if models} == LOADED[name]
