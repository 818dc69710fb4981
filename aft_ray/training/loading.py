"""Loads the model with the dtype, attention, quantization and LoRA of the settings.

Training and the proof afterwards both load through here, so that they compare models that were loaded alike.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aft_ray.config import TrainingConfig
from aft_ray.cpu import cpu_has_bfloat16
from aft_ray.errors import ConfigError, nearest
from aft_ray.models import resolve_adapter


def load_base(config: TrainingConfig, model: str, device: Any = None) -> Any:
    """Load the base model, to one device; with None the trainer places it.

    Raises ConfigError where the model cannot be loaded with these settings.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quantization = quantization_of(config)
    if quantization is not None and device is None:
        device = torch.cuda.current_device()  # 4-bit weights are quantized on the GPU that keeps them
    try:
        return AutoModelForCausalLM.from_pretrained(
            model,
            dtype=getattr(torch, dtype_name(config)),
            attn_implementation=None if config.attention == "auto" else config.attention,
            quantization_config=quantization,
            device_map=None if device is None else {"": device},
        )
    except (OSError, ValueError, TypeError, ImportError, LookupError, AttributeError, SafetensorError) as error:
        if isinstance(error.__cause__, ConnectionError | TimeoutError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigError(f"model {model} cannot be loaded on a training worker: {reason}") from error


def check_model(config: TrainingConfig, model: str, longest: int, what: str) -> None:
    """Raise ConfigError for what the settings ask of a model that it has not, before any weights are loaded.

    `longest` is the length in tokens that it must take, which `what` names.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(model)
    window = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if window is not None and longest > window:
        raise ConfigError(
            f"{what} {longest} > the window of {model}: {window} tokens (max_position_embeddings). Lower "
            "training_set.max_length and make the training set again, or train a model with a longer window"
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)
    if found is None:  # the model brings its own class
        return
    has = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(config.attention)
    if has is not None and not getattr(found, has, False):
        raise ConfigError(f"training.attention {config.attention}: {found.__name__} has none; set attention: auto")
    if config.method == "lora" and (config.lora.target_modules != "all-linear" or config.lora.modules_to_save):
        with torch.device("meta"):
            check_targets(config, AutoModelForCausalLM.from_config(settings))


def check_targets(config: TrainingConfig, base: Any) -> None:
    """Raise ConfigError for a name in `lora.target_modules` or `modules_to_save` that no module of the model has."""
    targets = config.lora.target_modules
    names = [name for name, _ in base.named_modules() if name]
    for saved in config.lora.modules_to_save:
        if not _is_there(saved, names):
            last_parts = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"training.lora.modules_to_save: {type(base).__name__} has no module {saved}; "
                f"{nearest(saved, last_parts, 'modules')}"
            )
    if isinstance(targets, str):
        if targets != "all-linear" and not any(re.fullmatch(targets, name) for name in names):
            raise ConfigError(
                f"training.lora.target_modules {targets!r}: this regular expression matches no module's full name, "
                f"such as {names[-1]}; give names as a list: [q_proj, v_proj]"
            )
        return
    for target in targets:
        if not _is_there(target, names):
            own = {
                name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)
            }
            raise ConfigError(
                f"training.lora.target_modules: {type(base).__name__} has no module {target}; "
                f"{nearest(target, sorted(own), 'modules')}"
            )


def _is_there(wanted: str, names: Sequence[str]) -> bool:
    return any(name == wanted or name.endswith(f".{wanted}") for name in names)


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
            base, str(resolve_adapter(config.init_adapter)), is_trainable=True, autocast_adapter_dtype=own_dtype
        )
        return start, None
    check_targets(config, base)
    lora, targets = config.lora, config.lora.target_modules
    return base, LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        ensure_weight_tying=bool(lora.modules_to_save) and _ties_its_head(base),
        task_type="CAUSAL_LM",
    )


def _ties_its_head(base: Any) -> bool:
    head = base.get_output_embeddings()
    return head is not None and head.weight is base.get_input_embeddings().weight


def load_trained(config: TrainingConfig, model: str, folder: Path, device: Any) -> Any:
    """Load what a finished training saved to one device: the whole model, or the base model with the adapter."""
    from peft import PeftModel

    if config.method == "full":
        return load_base(config, str(folder), device)
    base = load_base(config, model, device)
    return PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)


def is_bf16(config: TrainingConfig) -> bool:
    """Return whether this worker computes in bfloat16."""
    if config.bf16 is not None:
        return config.bf16
    return torch.cuda.is_bf16_supported(including_emulation=False) if config.gpus_per_worker else cpu_has_bfloat16()


def dtype_name(config: TrainingConfig) -> str:
    """Return the dtype in which weights are loaded.

    Small updates need weights of 32 bits. A LoRA has its own and DeepSpeed keeps a copy, but plain data parallelism
    trains the weights, or the copies of modules to save, as they were loaded.
    """
    trains_loaded = config.method == "full" or bool(config.lora.modules_to_save)
    needs_own_precision = trains_loaded and config.deepspeed == "none"
    return "bfloat16" if is_bf16(config) and not needs_own_precision else "float32"


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
