"""The paper's recipes load, pass every check that needs no network, and fit clusters that are only described."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aft_ray.cluster_fit import num_held, resources_of_worker
from aft_ray.config import Config, load_config
from aft_ray.config.conditions import placed_engines
from aft_ray.config.engines import gpus_of
from aft_ray.pipeline.checks import check_before_start
from aft_ray.pipeline.environment import names_needed

ROOT = Path(__file__).parent.parent.parent
PAPER = ROOT / "configs" / "paper"
RECIPES = sorted(file.stem for file in PAPER.glob("*.yaml"))
REMOTE = (
    "targets.engine={type: openai, base_url: 'https://api.example.org/v1', model: Qwen/Qwen2.5-72B-Instruct, "
    "api_key_env: TEACHER_API_KEY}"
)
H100 = {"CPU": 192.0, "GPU": 8.0, "accelerator_type:H100": 1.0}
L40S = {"CPU": 48.0, "GPU": 4.0, "accelerator_type:L40S": 1.0}
CLUSTERS = {"8 x H100": [H100], "4 x 8 x H100": [H100] * 4, "4 x L40S": [L40S]}


def recipe(name: str, *overrides: str) -> Config:
    return load_config(PAPER / f"{name}.yaml", overrides)


def test_there_are_four() -> None:
    assert RECIPES == ["llama_off_policy", "llama_on_policy", "mistral_off_policy", "mistral_on_policy"]


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_what_the_paper_says(name: str) -> None:
    config = recipe(name)
    model, _, policy = name.partition("_")
    assert config.engine.type == "vllm"
    assert config.engine.model == {"llama": "meta-llama/Llama-3.1-8B", "mistral": "mistralai/Mistral-7B-v0.1"}[model]
    assert [proposer.source for proposer in config.proposals.all_proposers] == [policy]
    assert config.prompts.source == "hub:openbmb/UltraFeedback:train"
    assert config.scores.reward_model == "sfairXC/FsfairX-LLaMA3-RM-v0.1"
    teacher = config.targets.engine
    assert teacher is not None and teacher.type == "vllm"
    assert teacher.model == "Qwen/Qwen2.5-72B-Instruct"
    assert (config.training.method, config.training.lora.rank) == ("lora", 8)
    if policy == "on_policy":
        sampling = config.proposals.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 50, 0.95)
        assert config.proposals.style == "in_context", "a base model does not chat"
    else:
        assert config.prompts.responses == "ultrafeedback"
        assert config.selection.num_proposals == config.proposals.num_per_prompt == 4, "as many as the data set has"


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("overrides", [(), (REMOTE, "targets.placement.max_actors=1")], ids=["local", "remote"])
def test_every_check_before_the_start_passes(name: str, overrides: tuple[str, ...]) -> None:
    config = recipe(name, *overrides, "run.dir=s3://bucket/run")
    check_before_start(config)
    assert names_needed(config) == (("TEACHER_API_KEY",) if overrides else ())


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_worker_fits_the_cluster_and_training_has_its_workers_at_once(name: str, cluster: str) -> None:
    config, nodes = recipe(name), CLUSTERS[cluster]
    asked = {
        "scores": resources_of_worker(config.scores.placement.num_cpus, 1, config.scores.placement.accelerator_type),
        **{
            key: resources_of_worker(1, num_gpus or gpus_of(engine), None)
            for key, engine, num_gpus in placed_engines(config)
        },
    }
    for key, wanted in asked.items():
        assert any(num_held(node, wanted) for node in nodes), key
    training = config.training
    worker = resources_of_worker(training.cpus_per_worker, training.gpus_per_worker or 1, training.accelerator_type)
    assert sum(num_held(node, worker) for node in nodes) >= training.num_workers


def test_recipes_are_kept_short_by_what_they_share() -> None:
    for name in RECIPES:
        text = (PAPER / f"{name}.yaml").read_text()
        own: dict[str, Any] = yaml.safe_load(text)
        assert "base" in own
        assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 15
