"""Every setting is checked, and every refusal names the key, the value found and what to do."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import yaml

from aft_ray.config import (
    Config,
    OpenAIEngineConfig,
    ScriptedEngineConfig,
    TransformersEngineConfig,
    VllmEngineConfig,
    load_config,
)
from aft_ray.errors import ConfigError

ROOT = Path(__file__).parent.parent
VLLM = {"type": "vllm", "model": "m/m"}
RUN = {"run": {"dir": "runs/x"}, "engine": VLLM}


def write(folder: Path, content: object, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_repository_loads(path: Path) -> None:
    assert isinstance(load_config(path), Config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": {"dir": "x", "sed": 1}}, ["run", "unknown key 'sed'", "did you mean 'seed'"]),
        ({"proposal": {}}, ["unknown key 'proposal'", "did you mean 'proposals'"]),
        ({"proposals": {"sampling": {"temprature": 1}}}, ["proposals.sampling", "'temprature'", "'temperature'"]),
        ({"proposals": {"num_per_prompt": "many"}}, ["proposals.num_per_prompt", "'many'"]),
        ({"proposals": {"num_per_prompt": 0}}, ["proposals.num_per_prompt", "greater than or equal to 1"]),
        ({"engine": {"type": "vlm", "model": "m/m"}}, ["engine", "vllm"]),
        ({"engine": {"type": "vllm"}}, ["engine.model", "required"]),
        ({"engine": {"type": "vllm", "model": "m/m", "max_len": 5}}, ["engine", "'max_len'", "'max_model_len'"]),
        ({"prompts": {"source": "hub:"}}, ["prompts.source", "'hub:' names no data set"]),
        (
            {"prompts": {"decontaminate": ["a.csv", "hub:#v1"]}},
            ["prompts.decontaminate", "'hub:#v1' names no data set"],
        ),
        ({"selection": {"num_proposals": 9}}, ["num_proposals 9", "num_per_prompt", "Raise"]),
        ({"evaluation": {"plan": {"subset_size": 9}}}, ["evaluation.plan", "subset_size 9 > num_proposals 5"]),
        ({"evaluation": {"plan": {"num_proposal": 9}}}, ["evaluation.plan", "'num_proposals'"]),
        ({"proposals": {"placement": {"min_actors": 3}}}, ["proposals.placement", "max_actors 1 < min_actors 3"]),
        (
            {"scores": {"scorer": "likelihood"}, "targets": {"filters": {"worse_than_best": True}}},
            ["worse_than_best", "likelihood cannot be compared", "reward model"],
        ),
        (
            {
                "targets": {
                    "engine": {"type": "vllm", "model": "m/m", "tensor_parallel_size": 4},
                    "placement": {"num_gpus": 0},
                }
            },
            ["targets.placement.num_gpus 0", "tensor_parallel_size 4", "Set them equal"],
        ),
        ({"proposals": {"placement": {"num_gpus": 0.5}}}, ["num_gpus 0.5", "gpu_memory_utilization 0.9", "Lower"]),
        ({"serving": {"aggregator": {"num_gpus": 2}}}, ["serving.aggregator.num_gpus 2", "tensor_parallel_size 1"]),
        (
            {
                "serving": {
                    "topology": "split",
                    "proposers": [
                        {
                            "name": "a",
                            "engine": {"type": "vllm", "model": "m/m", "pipeline_parallel_size": 2},
                            "replicas": {"num_gpus": 1},
                        }
                    ],
                }
            },
            ["serving.proposers.a.replicas.num_gpus 1", "pipeline_parallel_size 2"],
        ),
        (
            {"proposals": {"engine": {"type": "openai", "model": "m", "base_url": "u"}, "placement": {"num_gpus": 1}}},
            ["proposals.placement.num_gpus 1", "endpoint"],
        ),
        ({"engine": {**VLLM, "max_lora_rank": 24}}, ["engine.max_lora_rank", "24"]),
        ({"engine": {**VLLM, "args": {"quantisation": "fp8"}}}, ["args.quantisation", "did you mean 'quantization'"]),
        ({"engine": {**VLLM, "args": {"max_num_seqs": 4}}}, ["args.max_num_seqs", "engine's setting max_num_seqs"]),
        ({"engine": {**VLLM, "args": {"max_loras": 4}}}, ["args.max_loras", "engine's setting max_adapters"]),
        (
            {"engine": {**VLLM, "speculation": "ngram", "args": {"speculative_config": {"method": "suffix"}}}},
            ["args.speculative_config", "engine's setting speculation"],
        ),
        ({"proposals": {"placement": {"num_gpus": 2}}}, ["proposals.placement.num_gpus 2", "tensor_parallel_size 1"]),
        ({"training": {"quantization": "nf4", "gpus_per_worker": 0}}, ["training", "nf4 needs a GPU"]),
        ({"training": {"quantization": "nf4", "gpus_per_worker": 1, "deepspeed": "zero3"}}, ["ZeRO-3", "use zero2"]),
        ({"training": {"quantization": "nf4", "gpus_per_worker": 1, "method": "full"}}, ["method: lora"]),
        ({"training": {"lora": {"target_modules": ["q_proj", "lm_head"]}}}, ["lm_head", "never be trained"]),
        ({"training": {"method": "full", "init_adapter": "a"}}, ["init_adapter", "export --merged"]),
        (
            {"training": {"attention": "flash_attention_2", "gpus_per_worker": 0}},
            ["flash_attention_2 needs a GPU and bf16"],
        ),
        ({"training": {"pack_length": 64}}, ["pack_length 64 < training_set.max_length", "Raise pack_length"]),
        ({"engine": {"type": "openai", "model": "m", "base_url": "u"}}, ["cannot be trained", "targets.engine"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_refused_by_name(tmp_path: Path, change: dict[str, object], words: list[str]) -> None:
    path = write(tmp_path, {**RUN, **change})
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    for word in [str(path), *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"proposals": {"placement": {"num_gpus": 1}}},
        {"engine": {**VLLM, "gpu_memory_utilization": 0.45}, "proposals": {"placement": {"num_gpus": 0.5}}},
        {
            "engine": {**VLLM, "tensor_parallel_size": 2, "pipeline_parallel_size": 2},
            "serving": {"aggregator": {"num_gpus": 4}},
        },
        {"engine": {**VLLM, "tensor_parallel_size": 4}},
        {"training": {"lora": {"rank": 24}}},
        {"training": {"lora": {"dora": True}}, "serving": {"engine": {"type": "transformers", "model": "m/m"}}},
        {"engine": {**VLLM, "args": {"speculative_config": {"method": "suffix"}, "load_format": "dummy", "seed": 3}}},
    ],
    ids="-".join,
)
def test_gpus_adapters_and_arguments_that_fit_are_accepted(tmp_path: Path, change: dict[str, object]) -> None:
    assert load_config(write(tmp_path, {**RUN, **change})).run.dir == "runs/x"


@pytest.mark.parametrize(
    ("content", "words"),
    [("a: [", "not valid YAML"), ("- a", "expected a mapping"), ("", "expected a mapping")],
    ids=["broken", "list", "empty"],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")


def test_a_config_starts_from_its_base_and_holds_only_differences(tmp_path: Path) -> None:
    write(tmp_path, {**RUN, "proposals": {"num_per_prompt": 6, "sampling": {"top_k": 7}}}, "base.yaml")
    config = load_config(write(tmp_path, {"base": "base.yaml", "proposals": {"sampling": {"max_tokens": 9}}}))
    assert config.proposals.num_per_prompt == 6
    assert (config.proposals.sampling.top_k, config.proposals.sampling.max_tokens) == (7, 9)


def test_another_engine_type_replaces_the_bases_engine(tmp_path: Path) -> None:
    write(tmp_path, {**RUN, "engine": {"type": "vllm", "model": "m/m", "gpu_memory_utilization": 0.5}}, "base.yaml")
    config = load_config(write(tmp_path, {"base": "base.yaml", "engine": {"type": "transformers", "model": "n/n"}}))
    assert config.engine.type == "transformers"


def test_overrides_are_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path, RUN)
    config = load_config(path, ["proposals.sampling.top_k=3", "training_set.variants=[aft]", "run.dir=elsewhere"])
    assert config.proposals.sampling.top_k == 3
    assert config.training_set.variants == ("aft",)
    assert config.run.dir == "elsewhere"


@pytest.mark.parametrize("override", ["nonsense", "=3", "run.dir.deeper=1"], ids=["no-value", "no-key", "too-deep"])
def test_an_override_that_makes_no_sense_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_config(write(tmp_path, RUN), [override])


def test_a_resolved_config_loads_as_itself(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    path = write(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_what_only_costs_time_or_money_may_change_when_a_run_is_resumed() -> None:
    for engine in (VllmEngineConfig, TransformersEngineConfig, OpenAIEngineConfig, ScriptedEngineConfig):
        assert set(engine.model_fields) >= engine.OPERATIONAL, "every name is a setting"
    slow = {"type": "openai", "base_url": "http://a/v1", "model": "m", "timeout_s": 9, "max_concurrency": 1}
    patient = {**slow, "base_url": "http://b/v1", "timeout_s": 900, "max_concurrency": 64}
    one, other = (OpenAIEngineConfig.model_validate(raw) for raw in (slow, patient))
    assert one.identity() == other.identity()
    assert one.identity() != other.model_copy(update={"model": "n"}).identity()


def test_the_reference_of_all_settings_is_what_the_models_give() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run: python docs/configuration.py"
    assert not re.findall(r"^\|.*\| +\|$", made, re.MULTILINE), "settings without a docstring"
    headings = re.findall(r"^## (.*)$", made, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings) and set(re.findall(r"\(#(.*?)\)", made)) <= anchors
