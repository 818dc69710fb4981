"""`aft-ray plan` at stated speeds: tokens, hours and cost are computed by hand here, and every setting counts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from aft_ray.config import Config, load_config
from aft_ray.pipeline.estimate import StepEstimate, billions_of, estimate
from aft_ray.pipeline.preview import print_stated
from tests.command_line import ROOT

RUN: dict[str, Any] = {
    "run": {"dir": "/runs/x"},
    "engine": {"type": "vllm", "model": "owner/base-8B"},
    "prompts": {"source": "hub:owner/prompts", "held_out": 0},
    "proposals": {"num_per_prompt": 4, "sampling": {"max_tokens": 1000}, "placement": {"max_actors": 2}},
    "scores": {"scorer": "reward_model", "reward_model": "owner/reward-8B"},
    "selection": {"num_proposals": 4},
    "targets": {
        "engine": {"type": "vllm", "model": "owner/teacher-72B", "tensor_parallel_size": 4},
        "placement": {"max_actors": 2},
        "sampling": {"max_tokens": 1000},
    },
    "training_set": {"variants": ["aft"]},
    "estimate": {"num_gpus": 8, "prompt_tokens": 100, "answer_tokens": 400},
}


def steps(num_prompts: int = 1000, **sections: dict[str, Any]) -> dict[str, StepEstimate]:
    merged = {**RUN, **{name: {**RUN.get(name, {}), **values} for name, values in sections.items()}}
    return {one.step: one for one in estimate(Config.model_validate(merged), num_prompts)}


def test_tokens_follow_from_the_plan_of_the_run() -> None:
    found = steps()
    assert list(found) == ["proposals", "scores", "targets", "train"], "without held-out prompts nothing is evaluated"
    assert (found["proposals"].read, found["proposals"].written) == (1000 * 100, 1000 * 4 * 400)
    assert (found["scores"].read, found["scores"].written) == (1000 * 4 * (100 + 400), 0)
    assert (found["targets"].read, found["targets"].written) == (1000 * (100 + 4 * 400), 1000 * 400)
    assert found["train"].read == 1000 * (100 + 4 * 400 + 400)


def test_a_number_of_steps_takes_the_place_of_epochs() -> None:
    length = 100 + 4 * 400 + 400
    found = steps(training={"max_steps": 5, "batch_size_per_worker": 2, "num_workers": 3})
    assert found["train"].read == 5 * 2 * 3 * length
    packed = {"max_steps": 5, "batch_size_per_worker": 2, "pack_length": 4 * length}
    assert steps(training=packed)["train"].read == 5 * 2 * 4 * length


def test_hours_follow_from_size_and_peak() -> None:
    found = steps()
    reading, writing = 16e9 * 100_000 / (0.4 * 989e12), 16e9 * 1_600_000 / (0.2 * 989e12)
    assert found["proposals"].gpu_hours == pytest.approx((reading + writing) / 3600)
    assert found["proposals"].hours == pytest.approx((reading + writing) / 3600 / 2), "two workers of one GPU"
    assert found["targets"].gpus == 8
    assert found["train"].gpu_hours == pytest.approx(4 * 8e9 * 2_100_000 / (0.35 * 989e12) / 3600)


def test_what_was_measured_replaces_what_is_stated() -> None:
    found = steps(estimate={"tokens_per_second": {"proposals": 1000, "scores": 4000, "train": 500}})
    assert found["proposals"].gpu_hours == pytest.approx(1_600_000 / 1000 / 3600)
    assert found["scores"].gpu_hours == pytest.approx(2_000_000 / 4000 / 3600)
    assert found["train"].gpu_hours == pytest.approx(2_100_000 / 500 / 3600)
    stated = steps(estimate={"generation_utilization": 0.1})["proposals"].gpu_hours
    assert stated is not None and stated > 1.9 * (steps()["proposals"].gpu_hours or 0)


def test_the_price_is_the_users_where_one_is_set() -> None:
    hours = steps()["targets"].gpu_hours or 0
    assert steps(run={"usd_per_gpu_hour": 2.0})["targets"].usd == pytest.approx(2 * hours)
    paid = steps(run={"usd_per_gpu_hour": 2.0}, estimate={"usd_per_gpu_hour": 3.0})
    assert paid["targets"].usd == pytest.approx(3 * hours)
    assert (steps(estimate={"gpu": "L40S"})["targets"].gpu_hours or 0) == pytest.approx(hours * 989 / 362)


def test_a_remote_teacher_costs_its_tokens_and_no_gpu() -> None:
    remote = {"type": "openai", "base_url": "https://a/v1", "model": "t", "prices": {"prompt": 1, "completion": 2}}
    found = steps(targets={"engine": remote, "placement": {}})["targets"]
    assert (found.gpus, found.gpu_hours) == (0, 0)
    assert found.usd == pytest.approx((1000 * 1700 + 2 * 1000 * 400) / 1e6)


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("meta-llama/Llama-3.1-8B", 8),
        ("Qwen/Qwen2.5-72B-Instruct", 72),
        ("mistralai/Mistral-7B-v0.1", 7),
        ("Qwen/Qwen2.5-0.5B", 0.5),
        ("smollm2-135m-instruct", 0.135),
        ("sfairXC/FsfairX-LLaMA3-RM-v0.1", None),
        ("/models/mine", None),
    ],
)
def test_sizes_are_read_from_names(model: str, billions: float | None) -> None:
    assert billions_of(model, {}) == billions
    assert billions_of(model, {model: 3.5}) == 3.5


def said_of(config: Config) -> str:
    """Return what `plan` prints at stated speeds."""
    said = Console(file=io.StringIO(), width=300, highlight=False)
    print_stated(config, said)
    return str(said.file.getvalue())  # type: ignore[attr-defined]


def local_run(model: Path, **sections: dict[str, Any]) -> Config:
    """Return a run whose only model is in a local folder."""
    engine = {"type": "vllm", "model": str(model)}
    own = {"engine": engine, "targets": {}, "scores": {}, "estimate": {**RUN["estimate"], "num_prompts": 1000}}
    return Config.model_validate({**RUN, **own, **sections})


def test_the_size_of_a_local_model_is_what_its_files_hold(tmp_path: Path) -> None:
    numbers = np.zeros((500, 1000), dtype=np.float16)
    save_file({"a": numbers, "b": numbers}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": numbers}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"c": numbers}, tmp_path / "consolidated.safetensors")  # the same weights again
    assert billions_of(str(tmp_path), {}) == 0.0015
    assert billions_of(str(tmp_path), {str(tmp_path): 3}) == 3
    [found] = [one for one in estimate(local_run(tmp_path), 1000) if one.step == "train"]
    assert found.gpu_hours == pytest.approx(4 * 1.5e6 * found.read / (0.35 * 989e12) / 3600)
    said = said_of(local_run(tmp_path))
    assert f"Models, in billions of parameters: {tmp_path} 0.0015" in said and "not known" not in said


def test_weights_that_cannot_be_read_have_no_size(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert billions_of(str(tmp_path), {}) is None


def test_where_no_cost_is_known_none_is_printed(tmp_path: Path) -> None:
    said = said_of(local_run(tmp_path))
    assert "0.00" not in said
    assert f"train: the size of its model {tmp_path} is not known, so the sums are without it" in said
    remote = {"type": "openai", "base_url": "https://a/v1", "model": "t"}
    save_file({"a": np.zeros(10**6, dtype=np.float16)}, tmp_path / "model.safetensors")
    [row] = [
        line for line in said_of(local_run(tmp_path, targets={"engine": remote})).splitlines() if "│ targets" in line
    ]
    assert row.split("│")[-2].strip() == "no price"


@pytest.mark.parametrize("name", ["llama_on_policy", "llama_off_policy", "mistral_on_policy", "mistral_off_policy"])
@pytest.mark.parametrize("cluster", [("H100", 8), ("H100", 32), ("L40S", 4)], ids=str)
def test_the_papers_recipes_have_a_plan_on_every_described_cluster(name: str, cluster: tuple[str, int]) -> None:
    gpu, num_gpus = cluster
    settings = [f"estimate.gpu={gpu}", f"estimate.num_gpus={num_gpus}", "estimate.num_prompts=64000"]
    said = Console(file=io.StringIO(), width=120, highlight=False)
    print_stated(load_config(ROOT / "configs" / "paper" / f"{name}.yaml", settings), said)
    text = said.file.getvalue()  # type: ignore[attr-defined]
    assert f"64,000 prompts on {num_gpus} x {gpu}" in text
    assert "not known" not in text and "│ -" not in text
    assert ("proposals" in text) == name.endswith("on_policy"), "the others come with the data set"
    for step in ("scores", "targets", "train", "evaluate", "all"):
        assert f"│ {step} " in text


def test_prompts_that_cannot_be_counted_do_not_end_the_plan() -> None:
    said = Console(file=io.StringIO(), width=300, highlight=False)
    print_stated(Config.model_validate(RUN), said)  # the hub is out of reach of tests
    text = said.file.getvalue()  # type: ignore[attr-defined]
    assert "10,000 prompts on 8 x H100" in text
    assert "The prompts cannot be counted here (prompts.source hub:owner/prompts" in text
    assert "so this is for 10,000. To change that, set estimate.num_prompts" in text
