"""Settings that cannot work together are refused before anything starts, with the reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import LoraSettings, TrainingConfig, load_config
from aft_ray.errors import ConfigError
from aft_ray.pipeline.steps import check_before_start
from aft_ray.training import check_before_training


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BloomConfig", "BloomForCausalLM takes no position ids"),
        ("MambaConfig", "MambaForCausalLM takes no position ids"),
        ("JambaConfig", "JambaForCausalLM has a recurrent state that continues"),
    ],
)
def test_packing_is_refused_for_a_model_that_carries_one_example_into_the_next(
    name: str, reason: str, tmp_path: Path
) -> None:
    import transformers

    getattr(transformers, name)().save_pretrained(tmp_path / "model")
    check_before_training(TrainingConfig(), str(tmp_path / "model"))
    with pytest.raises(ConfigError, match=f"training.pack_length: {reason}"):
        check_before_training(TrainingConfig(pack_length=64), str(tmp_path / "model"))
    run = tmp_path / "run.yaml"
    run.write_text(
        json.dumps({"run": {"dir": "x"}, "engine": {"type": "transformers", "model": str(tmp_path / "model")}})
    )
    with pytest.raises(ConfigError, match=reason):  # and so before the first stage of a run
        check_before_start(load_config(run, ["training.pack_length=8192"]))


def test_packing_is_allowed_where_attention_knows_positions(tiny_model: Path) -> None:
    check_before_training(TrainingConfig(pack_length=64), str(tiny_model))


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(tracker: Any, tiny_model: Path) -> None:
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed here")
    with pytest.raises(ConfigError, match=f"training.report_to: {tracker} is not installed here: pip install"):
        check_before_training(TrainingConfig(report_to=(tracker,)), str(tiny_model))


def test_a_second_round_keeps_its_adapters_shape(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    config = TrainingConfig(init_adapter=str(tmp_path), lora=LoraSettings(rank=8, alpha=16))
    with pytest.raises(ConfigError, match=r"init_adapter: no such file: .*adapter_config\.json"):
        check_before_training(config, str(tiny_model))
    LoraConfig(r=16, lora_alpha=16).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"init_adapter: no such file: .*adapter_model\.safetensors"):
        check_before_training(config, str(tiny_model))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"training.lora.rank is 8, but training.init_adapter has 16"):
        check_before_training(config, str(tiny_model))
    LoraConfig(r=8, lora_alpha=16).save_pretrained(str(tmp_path))
    check_before_training(config, str(tiny_model))
