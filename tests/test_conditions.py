"""What must hold between the sections of a config, and on this machine: one row for each condition that is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from aft_ray.config import Config, load_config
from aft_ray.config import conditions as between_sections
from aft_ray.errors import AftError, ConfigError
from aft_ray.pipeline import checks as on_this_machine
from aft_ray.storage import Folder

ROOT = Path(__file__).parent.parent
VLLM = {"type": "vllm", "model": "m/m"}
BROKEN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "enough_proposals": [({"selection": {"num_proposals": 9}}, "Raise num_per_prompt")],
    "varied_within_selection": [({"training_set": {"vary_num_proposals": [2, 9]}}, "expected 1 <= smallest")],
    "pseudo_targets_exist": [({"training_set": {"variants": ["pseudo"]}}, "set targets.pseudo to true")],
    "answers_that_came_with_the_prompts": [
        ({"training_set": {"source": "prompts"}}, "Set variants to [sft_reference]"),
        ({"training_set": {"answers": "all"}}, "only the last answer is a target here"),
    ],
    "answers_for_off_policy": [({"proposals": {"proposers": [{"source": "off_policy"}]}}, "set prompts.responses")],
    "comparable_scores": [
        ({"scores": {"scorer": scorer}, "targets": {"filters": {"worse_than_best": True}}}, f"scores of the {scorer}")
        for scorer in ("likelihood", "none")
    ],
    "easy_means_verified": [
        ({"scores": {"scorer": scorer}, "selection": {"easy_per_hard": 1}}, f"a score of {scorer} does not say")
        for scorer in ("length", "agreement", "likelihood", "none")
    ],
    "accepted_means_verified": [
        ({"targets": {"keep": keep}, "prompts": {"task": "poems"}}, f"targets.keep {keep} keeps what a verifier")
        for keep in ("first", "shortest", "all")
    ],
    "likelihood_is_local": [
        (
            {
                "scores": {
                    "scorer": "likelihood",
                    "likelihood": {"engine": {"type": "openai", "model": "m", "base_url": "u"}},
                }
            },
            "returns no log-probabilities",
        )
    ],
    "packs_hold_examples": [({"training": {"pack_length": 64}}, "Raise pack_length")],
    "held_out_decides": [
        (
            {"training": {"eval_steps": 5, "early_stopping_patience": 2}, "prompts": {"held_out": 0}},
            "prompts.held_out is 0: raise it",
        )
    ],
    "early_stopping_can_fire": [
        (
            {"training": {"eval_steps": 5, "early_stopping_patience": 2, "max_steps": 15}},
            "training.early_stopping_patience 2 with training.eval_steps 5 can stop a training at step 15 at the "
            "earliest, and this one ends at step 15 (training.max_steps)",
        ),
        (
            {"training": {"eval_steps": 3, "early_stopping_patience": 1}, "prompts": {"limit": 24, "held_out": 4}},
            "and this one ends at step 6 (at the latest, with prompts.limit 24)",
        ),
    ],
    "trained_within_window": [({"engine": {**VLLM, "max_model_len": 2048}}, "is never served with")],
    "trained_model_is_local": [({"engine": {"type": "openai", "base_url": "u", "model": "m"}}, "cannot be trained")],
    "trained_on_gpus_too": [
        ({"proposals": {"placement": {"num_gpus": 1}}, "training": {"gpus_per_worker": 0}}, "trained on CPUs")
    ],
    "engines_have_their_gpus": [
        ({"targets": {"engine": {**VLLM, "tensor_parallel_size": 4}, "placement": {"num_gpus": 1}}}, "targets"),
        (
            {"serving": {"engine": {**VLLM, "tensor_parallel_size": 4}, "aggregator": {"num_gpus": 1}}},
            "serving.aggregator",
        ),
        ({"proposals": {"placement": {"num_gpus": 0.5}}}, "gpu_memory_utilization 0.9 of a whole GPU"),
        (
            {"targets": {"engine": {"type": "openai", "model": "m", "base_url": "u"}, "placement": {"num_gpus": 1}}},
            "targets.placement.num_gpus 1, but its engine is an endpoint",
        ),
    ],
    "engines_take_the_adapters": [
        (
            {"engine": {**VLLM, "max_lora_rank": 16}, "training": {"lora": {"rank": 64}}},
            "training.lora.rank 64 > engine.max_lora_rank 16",
        ),
        (
            {"serving": {"engine": {**VLLM, "max_lora_rank": 8}}, "training": {"lora": {"rank": 20}}},
            "training.lora.rank 20 > serving.engine.max_lora_rank 8",
        ),
        ({"training": {"lora": {"rank": 513}}}, "loads ranks up to 512"),
        ({"training": {"lora": {"target_modules": ["embed_tokens"]}}}, "cannot load an adapter on embeddings"),
        ({"training": {"lora": {"dora": True}}}, "vLLM, which cannot load DoRA"),
        (
            {"training": {"lora": {"modules_to_save": ["embed_tokens"]}}},
            "vLLM, which cannot load such an adapter: set serving.engine to a transformers engine, or serving.adapters",
        ),
        (
            {"proposals": {"adapter": "a", "engine": {**VLLM, "max_lora_rank": 0}}},
            "proposals.adapter a, but max_lora_rank",
        ),
    ],
    "evaluated_models_exist": [
        ({"evaluation": {"systems": [{"name": "x", "model": "atf@k3-l2"}]}}, "the run serves base, sft, aft")
    ],
    "served_models_exist": [
        ({"serving": {"default_model": "atf"}}, "is not one of the models base, sft, aft"),
        ({"serving": {"topology": "split", "proposer_adapter": "base"}}, "is not one of the adapters sft, aft"),
    ],
    "plans_within_limits": [
        ({"evaluation": {"plan": {"num_layers": 9}}}, "evaluation.plan: num_layers 9 > serving.max_num_layers 4"),
        ({"evaluation": {"plan": {"num_proposals": 17}}}, "evaluation.plan: num_proposals 17"),
        ({"evaluation": {"plan": {"final": {"max_tokens": 5000}}}}, "Raise serving.max_tokens"),
        (
            {"evaluation": {"systems": [{"name": "x", "model": "aft", "plan": {"num_layers": 9}}]}},
            "evaluation.systems.x.plan: num_layers 9",
        ),
        ({"serving": {"plan": {"num_layers": 9}}}, "serving.plan: num_layers 9"),
    ],
}
CASES = [pytest.param(*case, id=f"{name}-{n}") for name, cases in BROKEN.items() for n, case in enumerate(cases)]


def config_of(folder: Path, change: dict[str, Any]) -> Config:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": str(folder / "run")}, "engine": VLLM, **change}))
    return load_config(path)


def test_every_condition_has_a_row() -> None:
    assert [condition.__name__ for condition in between_sections.CONDITIONS] == list(BROKEN)


@pytest.mark.parametrize(("change", "words"), CASES)
def test_a_broken_condition_is_refused_when_the_config_is_read(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(tmp_path, change)
    assert words in str(refused.value)
    assert str(refused.value).count("\n") == 0, "one problem, one sentence"


@pytest.mark.parametrize(
    "change",
    [
        {"training": {"max_steps": 16}},
        {"prompts": {"limit": 28}},
        {"prompts": {"limit": 14}, "training_set": {"variants": ["joint"]}},
        {"prompts": {"limit": 14}, "targets": {"num_candidates": 2, "keep": "all"}},
        {},
    ],
    ids=["steps", "epochs", "two examples per prompt", "several targets", "prompts that are not counted yet"],
)
def test_early_stopping_that_may_fire_is_accepted(tmp_path: Path, change: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"eval_steps": 5, "early_stopping_patience": 2}
    if "max_steps" not in change.get("training", {}):
        asked = {"eval_steps": 3, "early_stopping_patience": 1}
    config_of(tmp_path, {**change, "training": {**asked, **change.get("training", {})}})


def test_all_problems_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(tmp_path, {"selection": {"num_proposals": 9}, "training": {"pack_length": 64, "lora": {"rank": 600}}})
    assert len(str(refused.value).splitlines()) == 3


SHIPPED = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.name != "base.yaml"]
"""All but the one that makes its own base model and has no line to run."""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_config_of_the_project_can_start_here(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    on_this_machine.check_before_start(load_config(path))


HERE: dict[str, list[tuple[dict[str, Any], str]]] = {
    "packages_are_installed": [
        ({"training": {"quantization": "nf4", "gpus_per_worker": 1}}, "needs the package bitsandbytes"),
    ],
    "own_verifier_is_there": [
        ({"scores": {"verifier": "nowhere.at_all:check"}}, "scores.verifier nowhere.at_all:check: cannot import"),
        ({"scores": {"verifier": "json:dumb"}}, "json has no dumb; its functions: "),
        ({"scores": {"verifier": "json:load"}}, "expected a function of (row, text)"),
    ],
    "templates_can_be_read": [
        ({"templates": {"aggregator": "nowhere.yaml"}}, "nowhere.yaml"),
        ({"serving": {"templates": {"in_context": "nowhere.yaml"}}}, "nowhere.yaml"),
    ],
    "models_are_there": [
        ({"engine": {**VLLM, "model": "./nowhere"}}, "model ./nowhere: no such folder"),
        ({"serving": {"engine": {**VLLM, "model": "/nowhere"}}}, "model /nowhere: no such folder"),
        ({"scores": {"scorer": "reward_model", "reward_model": "./nowhere"}}, "model ./nowhere: no such folder"),
        ({"proposals": {"adapter": "nowhere"}}, "proposals.adapter nowhere: no adapter there"),
        ({"serving": {"adapters": {"aft": "nowhere"}}}, "serving.adapters.aft nowhere: no adapter there"),
    ],
    "chat_templates_are_there": [
        (
            {"engine": {**VLLM, "model": "./bare"}},
            "engine.model ./bare comes without a chat template: set engine.chat_",
        ),
        ({"targets": {"engine": {**VLLM, "model": "./bare"}}}, "set targets.engine.chat_template (chatml, llama3"),
    ],
    "training_can_start": [
        ({"training": {"init_adapter": "nowhere"}}, "training.init_adapter: adapter nowhere: no such folder")
    ],
    "answers_fit_the_window": [
        (
            {"engine": {**VLLM, "max_model_len": 4096}, "proposals": {"sampling": {"max_tokens": 4096}}},
            "proposals.sampling.max_tokens 4096 + a prompt of at least 1 tokens > max_model_len 4096",
        )
    ],
}


def test_every_condition_of_this_machine_has_a_row() -> None:
    assert [condition.__name__ for condition in on_this_machine.CONDITIONS] == list(HERE)


@pytest.mark.parametrize(
    ("change", "words"),
    [pytest.param(*case, id=f"{name}-{n}") for name, cases in HERE.items() for n, case in enumerate(cases)],
)
def test_what_this_machine_lacks_is_refused_before_anything_starts(
    tmp_path: Path, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AftError) as refused:
        on_this_machine.check_before_start(config_of(tmp_path, change))
    assert words in str(refused.value)
    assert refused.value.exit_code == 2


def prompts_with(folder: Path, *tasks: str | None, reference: str | None = "42") -> Folder:
    prompts = Folder.at(folder / "prompts")
    for number, task in enumerate(tasks):
        table = pa.table({"task": pa.array([task], pa.string()), "reference": pa.array([reference], pa.string())})
        prompts.write_table(f"shard-{number:05d}.parquet", table)
    return prompts


def test_targets_kept_by_a_verifier_need_prompts_that_have_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = prompts_with(tmp_path, None, "poems")
    kept = config_of(tmp_path, {"targets": {"keep": "shortest"}})
    with pytest.raises(ConfigError, match=r"2 of 2 prompts have none \(tasks: 1 no task, 1 poems\)"):
        on_this_machine.check_tasks(kept, prompts)
    on_this_machine.check_tasks(config_of(tmp_path, {}), prompts)
    assert "the report cannot tell which answers are better" in capsys.readouterr().err
    on_this_machine.check_tasks(config_of(tmp_path, {"scores": {"scorer": "length"}}), prompts)
    prompts_with(tmp_path, None, "numeric")
    with pytest.raises(ConfigError, match="1 of 2 prompts have none"):
        on_this_machine.check_tasks(kept, prompts)
    on_this_machine.check_tasks(kept, prompts_with(tmp_path, None, *["numeric"] * 9))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": {"source": "reference"}}, "targets.source reference needs the reference answers"),
        ({"training_set": {"variants": ["sft", "sft_reference"]}}, "training_set.variants sft_reference needs"),
    ],
)
def test_references_that_the_targets_need_are_looked_for_in_the_prompts(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = config_of(tmp_path, change)
    on_this_machine.check_tasks(config, prompts_with(tmp_path, "numeric"))
    with pytest.raises(ConfigError, match=f"{words}.*1 of 1 have none"):
        on_this_machine.check_tasks(config, prompts_with(tmp_path, "numeric", reference=None))


def test_a_verifiers_package_is_looked_for_when_the_prompts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(on_this_machine.PACKAGES, "ifeval", ("not_installed", "pip install it"))
    with pytest.raises(ConfigError, match="task ifeval of the prompts needs the package not_installed"):
        on_this_machine.check_tasks(config_of(tmp_path, {}), prompts_with(tmp_path, "ifeval"))


def test_a_model_by_url_is_looked_up_where_it_lies(bucket: str, tmp_path: Path) -> None:
    change = {"engine": {**VLLM, "model": f"{bucket}/base"}}
    with pytest.raises(ConfigError, match=f"engine.model {bucket}/base: no config.json there"):
        on_this_machine.check_before_start(config_of(tmp_path, change))
    Folder.at(f"{bucket}/base").write_bytes("config.json", json.dumps({}).encode())
    on_this_machine.check_before_start(config_of(tmp_path, change))
