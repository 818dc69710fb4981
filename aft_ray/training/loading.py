"""Loads the model with the dtype, attention, quantization and LoRA of the settings.

Training and the proof afterwards both load through here, so that they compare models that were loaded alike.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from aft_ray.config import TrainingConfig
from aft_ray.cpu import cpu_has_bfloat16
from aft_ray.errors import ConfigError


def load_base(config: TrainingConfig, model: str, device_map: Any = None) -> Any:
    """Load the base model. With `device_map` None the trainer places it; "auto" spreads it over the devices."""
    from transformers import AutoModelForCausalLM

    quantization = quantization_of(config)
    if quantization is not None and device_map is None:
        device_map = {"": torch.cuda.current_device()}  # 4-bit weights are quantized on the GPU that keeps them
    return AutoModelForCausalLM.from_pretrained(
        model,
        dtype=getattr(torch, dtype_name(config)),
        attn_implementation=attention_of(config),
        quantization_config=quantization,
        device_map=device_map,
    )


def with_lora(config: TrainingConfig, base: Any) -> tuple[Any, Any]:
    """Return the model to train and the LoRA that TRL adds to it.

    The LoRA is None where training starts from an adapter or trains every weight.
    """
    from peft import LoraConfig, PeftModel

    if config.method == "full":
        return base, None
    if config.init_adapter:
        # ZeRO-3 needs adapter and base in one dtype, as TRL sees to for a fresh LoRA (trl#6089)
        own_dtype = not config.deepspeed.startswith("zero3")
        start = PeftModel.from_pretrained(
            base, config.init_adapter, is_trainable=True, autocast_adapter_dtype=own_dtype
        )
        return start, None
    lora, targets = config.lora, config.lora.target_modules
    return base, LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def load_trained(config: TrainingConfig, model: str, folder: Path) -> Any:
    """Load what a finished training saved: the whole model, or the base model with the adapter."""
    from peft import PeftModel

    device_map = "auto" if config.gpus_per_worker else None
    if config.method == "full":
        return load_base(config, str(folder), device_map)
    base = load_base(config, model, device_map)
    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)


def is_bf16(config: TrainingConfig) -> bool:
    """Return whether this worker computes in bfloat16."""
    if config.bf16 is not None:
        return config.bf16
    return torch.cuda.is_bf16_supported(including_emulation=False) if config.gpus_per_worker else cpu_has_bfloat16()


def dtype_name(config: TrainingConfig) -> str:
    """Return the dtype in which weights are loaded.

    Small updates need weights of 32 bits. A LoRA has its own and DeepSpeed keeps a copy, but plain data parallelism
    trains the weights as they were loaded.
    """
    needs_own_precision = config.method == "full" and config.deepspeed == "none"
    return "bfloat16" if is_bf16(config) and not needs_own_precision else "float32"


def attention_of(config: TrainingConfig) -> str:
    """Return the attention to use. `auto` takes flash-attn where it is installed and can run, else PyTorch's own."""
    if config.attention != "auto":
        return config.attention
    has_flash = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if has_flash and config.gpus_per_worker and is_bf16(config) else "sdpa"


def quantization_of(config: TrainingConfig) -> Any | None:
    """Return 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314), or None for no quantization."""
    if config.quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "training.quantization nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if is_bf16(config) else torch.float32,
    )
