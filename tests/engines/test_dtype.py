"""Which dtype `auto` means on this CPU. A wrong choice makes everything ten times slower or more."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from aft_ray import cpu
from aft_ray.config import TrainingConfig, TransformersEngineConfig
from aft_ray.engines.transformers import TransformersEngine
from aft_ray.training import loading
from tests.training.tiny import write_model

CPUINFO = Path("/proc/cpuinfo")


@pytest.fixture(params=[True, False], ids=["has bfloat16", "has none"])
def has_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    for module in (cpu, loading):
        monkeypatch.setattr(module, "cpu_has_bfloat16", lambda: request.param)
    return bool(request.param)


@pytest.mark.skipif(platform.machine() != "x86_64" or not CPUINFO.is_file(), reason="reads the flags of Linux on x86")
def test_an_x86_cpu_has_bfloat16_with_instructions_for_it_and_not_with_avx512_alone() -> None:
    flags = CPUINFO.read_text().split()
    assert cpu.cpu_has_bfloat16() == ("avx512_bf16" in flags or "amx_bf16" in flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an engine takes the GPU")
@pytest.mark.parametrize("stated", ["auto", "bfloat16", "float32"])
def test_auto_is_float32_where_bfloat16_would_crawl(stated: str, has_bfloat16: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = TransformersEngineConfig.model_validate({"model": str(folder), "dtype": stated})
    expected = {"auto": "bfloat16" if has_bfloat16 else "float32"}.get(stated, stated)
    assert TransformersEngine(config).model.dtype == getattr(torch, expected)


@pytest.mark.parametrize("stated", [None, True, False])
def test_training_computes_in_bfloat16_where_the_processor_does(stated: bool | None, has_bfloat16: bool) -> None:
    config = TrainingConfig(bf16=stated, deepspeed="zero2")
    assert loading.is_bf16(config) == (has_bfloat16 if stated is None else stated)
    assert loading.dtype_name(config) == ("bfloat16" if loading.is_bf16(config) else "float32")
