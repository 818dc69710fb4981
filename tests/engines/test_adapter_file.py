"""What is read from an adapter's files before an engine loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from aft_ray.engines.adapter_file import (
    layers_of,
    layers_of_model,
    read_adapter,
    why_not_of_this_model,
    why_vllm_cannot,
)
from aft_ray.errors import EngineError
from tests.training.tiny import write_model


def write(folder: Path, **settings: object) -> str:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "use_dora": False, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return str(folder)


def test_an_ordinary_adapter_fits(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path))
    assert (adapter.rank, adapter.unusual) == (8, ())
    assert why_vllm_cannot(adapter, 8) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 64}, ["rank 64", "engine.max_lora_rank 16"]),
        ({"rank_pattern": {"q_proj": 32}}, ["rank 32"]),
        ({"use_dora": True}, ["use_dora true", "transformers engine"]),
        ({"modules_to_save": ["lm_head"]}, ['modules_to_save ["lm_head"]']),
        ({"bias": "all"}, ['bias "all"']),
        ({"alpha_pattern": {"q_proj": 4}}, ["alpha_pattern"]),
        ({"peft_type": "IA3"}, ['peft_type "IA3"']),
    ],
)
def test_what_vllm_cannot_apply_is_said(tmp_path: Path, settings: dict[str, object], words: list[str]) -> None:
    reason = why_vllm_cannot(read_adapter(write(tmp_path, **settings)), 16)
    assert reason is not None
    for word in words:
        assert word in reason


def test_an_engine_without_adapters_names_the_setting(tmp_path: Path) -> None:
    assert "engine.max_lora_rank" in (why_vllm_cannot(read_adapter(write(tmp_path)), 0) or "")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"r": null}', '{"r": "eight"}'],
    ids=["cut-off", "a-list", "empty", "rank-null", "rank-word"],
)
def test_a_damaged_config_is_an_engine_error_with_its_folder(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(EngineError, match=r"adapter_config\.json is not that of a LoRA") as caught:
        read_adapter(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def write_weights(folder: Path, inputs: int) -> None:
    parts = {"A": (2, inputs), "B": (32, 2)}
    tensors = {
        f"model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.zeros(shape) for part, shape in parts.items()
    }
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )


def test_the_layers_of_a_real_adapter_fit_its_model_and_no_other(tmp_path: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "small"))
    large = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "large", hidden_size=64))
    model, other = layers_of_model(small), layers_of_model(large)
    assert set(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    get_peft_model(small, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    adapter = layers_of(str(tmp_path / "adapter"))
    assert adapter == model
    assert why_not_of_this_model(adapter, model) is None
    assert "another base model" in (why_not_of_this_model(adapter, other) or "")


def test_a_layer_that_the_model_does_not_name_is_left_to_the_engine(tmp_path: Path) -> None:
    write_weights(tmp_path, inputs=48)
    adapter = layers_of(str(tmp_path))
    assert adapter == {"q_proj": {(48, 32)}}
    assert why_not_of_this_model(adapter, {"k_proj": {(16, 16)}}) is None
    assert "48 to 32" in (why_not_of_this_model(adapter, {"q_proj": {(16, 32)}}) or "")


def test_weights_that_are_cut_off_are_an_engine_error(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(EngineError, match="cannot be read"):
        layers_of(str(tmp_path))
