"""What vLLM is told, on CPUs and on GPUs, without starting it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import VllmEngineConfig
from aft_ray.config.engines import vllm_arguments
from aft_ray.engines.adapter_file import layers_of_model
from aft_ray.engines.vllm import engine_arguments, lora_rank_of

LAYERS = {"q_proj": {(8, 8)}}


def arguments(*, on_cpu: bool = False, rank: int = 0, is_server: bool = False, **settings: Any) -> dict[str, Any]:
    config = VllmEngineConfig(model="a/b", **settings)
    layers = LAYERS if rank else {}
    return engine_arguments(config, "a/b", on_cpu=on_cpu, max_lora_rank=rank, layers=layers, is_server=is_server)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_argument_is_one_of_vllms(on_cpu: bool) -> None:
    assert len(vllm_arguments()) > 100
    told = arguments(on_cpu=on_cpu, rank=8, speculation="ngram", max_model_len=64)
    assert told.keys() <= vllm_arguments()


def test_a_gpu_engine_has_vllms_own_batch_sizes_and_no_adapters_unless_they_are_used() -> None:
    told = arguments()
    assert told["max_num_seqs"] is None and "max_num_batched_tokens" not in told
    assert "enable_lora" not in told
    assert told["distributed_executor_backend"] == "uni"
    assert arguments(rank=32)["max_lora_rank"] == 32


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 4}, {"pipeline_parallel_size": 2}])
def test_an_engine_on_several_gpus_runs_them_as_processes_of_its_node(sizes: dict[str, int]) -> None:
    assert arguments(**sizes)["distributed_executor_backend"] == "mp"


def test_on_a_cpu_seeds_prefill_prompts_in_one_piece() -> None:
    told = arguments(on_cpu=True, max_model_len=512)
    assert (told["max_num_seqs"], told["enable_chunked_prefill"], told["max_num_batched_tokens"]) == (256, False, 512)
    assert "enable_chunked_prefill" not in arguments(on_cpu=True, seeds=False)
    assert "enable_chunked_prefill" not in arguments(seeds=True)


def test_on_a_cpu_adapters_go_to_the_models_own_layers_also_where_they_are_fused() -> None:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config(num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, **small))
    config = VllmEngineConfig(model="a/b")
    layers = layers_of_model(model)
    told = engine_arguments(config, "a/b", on_cpu=True, max_lora_rank=8, layers=layers, is_server=False)
    assert told["lora_target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_other_arguments_of_vllm_pass_through() -> None:
    told = arguments(args={"quantization": "fp8", "max_num_batched_tokens": 4096, "enable_prefix_caching": False})
    assert (told["quantization"], told["max_num_batched_tokens"]) == ("fp8", 4096)
    assert told["enable_prefix_caching"] is False


def test_metrics_are_on_where_answers_are_served() -> None:
    assert (arguments()["disable_log_stats"], arguments(is_server=True)["disable_log_stats"]) == (True, False)


@pytest.mark.parametrize(
    ("setting", "ranks", "least", "expected"),
    [
        (None, [], 0, 0),
        (None, [4], 0, 8),
        (None, [8, 12], 0, 16),
        (None, [], 16, 16),
        (None, [32], 16, 32),
        (None, [600], 0, 512),
        (64, [8], 0, 64),
        (0, [8], 16, 0),
    ],
)
def test_the_rank_is_that_of_the_adapters(
    setting: Any, ranks: list[int], least: int, expected: int, tmp_path: Path
) -> None:
    for number, rank in enumerate(ranks):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "adapter_config.json").write_text(json.dumps({"r": rank}))
    folders = [str(tmp_path / str(number)) for number in range(len(ranks))]
    assert lora_rank_of(VllmEngineConfig(model="a/b", max_lora_rank=setting), folders, least) == expected


def test_what_only_costs_time_or_memory_is_no_part_of_an_engines_identity() -> None:
    plain = VllmEngineConfig(model="a/b")
    faster = VllmEngineConfig(
        model="a/b",
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        max_num_seqs=8,
        max_lora_rank=64,
        args={"enforce_eager": True, "max_num_batched_tokens": 2048},
    )
    assert plain.identity() == faster.identity()
    assert VllmEngineConfig(model="a/b", args={"quantization": "fp8"}).identity() != plain.identity()
