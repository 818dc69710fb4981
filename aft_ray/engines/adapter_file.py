"""What the files of a LoRA adapter say about it, read before an engine is asked to load them.

    adapter = read_adapter("runs/mine/model/aft")      rank 8, no DoRA
    why_vllm_cannot(adapter, max_lora_rank=16)         None

vLLM loads an adapter inside the batch that uses it. One that it cannot load would end the engine there, and with it the
answers of everybody else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft_ray.config.engines import LARGEST_LORA_RANK
from aft_ray.errors import ConfigError, EngineError, StorageError
from aft_ray.hub import is_hub_id, snapshot
from aft_ray.storage import local_copy

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """One peft adapter."""

    folder: str
    """Where it lies on this node."""
    rank: int
    """The largest rank of its modules."""
    unusual: tuple[str, ...]
    """Settings that vLLM does not know, or leaves out of account, as `name value`."""


def adapter_folder(reference: str) -> Path:
    """Return the folder of an adapter on this node, where a URL or a commit of the hub is fetched once.

    Raises EngineError for a URL or a repository that cannot be read from here.
    """
    try:
        return snapshot(reference) if is_hub_id(reference) else local_copy(reference)
    except (ConfigError, StorageError) as error:
        raise EngineError(f"adapter {error}") from error  # which begins with the reference


def read_adapter(reference: str) -> AdapterFile:
    """Read the config of a peft adapter. Raises EngineError for a folder, URL or repository that holds none."""
    folder = adapter_folder(reference)
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        rank = max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
    except FileNotFoundError:
        raise EngineError(f"adapter {reference}: no {CONFIG} in that folder") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"adapter {reference}: {CONFIG} is not that of a LoRA ({type(error).__name__}: {error})"
        ) from None
    return AdapterFile(folder=str(folder), rank=rank, unusual=tuple(_unusual(config)))


def _unusual(config: dict[str, Any]) -> list[str]:
    """Return the settings that change what an adapter computes and that vLLM's PEFTHelper refuses or never reads."""
    names = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication")
    found = [f"{name} {json.dumps(config[name])}" for name in names if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append(f"bias {json.dumps(config['bias'])}")
    if config.get("peft_type", "LORA") != "LORA":
        found.append(f"peft_type {json.dumps(config['peft_type'])}")
    return found


Layers = Mapping[str, Collection[tuple[int, int]]]
"""Linear layers by the last part of their name (`q_proj`), with the (inputs, outputs) of all that are called so."""


def layers_of(folder: str) -> Layers:
    """Return the layers that an adapter changes, from the index of its weights. Raises EngineError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder, WEIGHTS)
    if not path.is_file():  # the older adapter_model.bin has no index
        return {}
    shapes: dict[str, list[int]] = {}
    try:
        with safe_open(path, framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise EngineError(f"adapter {folder}: {WEIGHTS} cannot be read: {error}") from None
    found: dict[str, set[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        layer, mark, _ = name.partition(".lora_A.")
        outputs = shapes.get(name.replace(".lora_A.", ".lora_B."))
        if mark and outputs is not None:
            found.setdefault(layer.rsplit(".", 1)[-1], set()).add((shape[-1], outputs[0]))
    return found


def layers_of_model(model: Any) -> Layers:
    """Return the linear layers of a transformers model, without its head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found: dict[str, set[tuple[int, int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            inputs, outputs = (
                reversed(module.weight.shape) if isinstance(module, torch.nn.Linear) else module.weight.shape
            )
            found.setdefault(name.rsplit(".", 1)[-1], set()).add((inputs, outputs))
    return found


def why_not_of_this_model(adapter: Layers, model: Layers) -> str | None:
    """Return which layer of an adapter has a shape that no layer of that name has in the model; None where all fit.

    vLLM copies an adapter that is too small into a corner of its own tensors, and says nothing.
    """
    for name, shapes in adapter.items():
        others = set(shapes) - set(model.get(name, shapes))
        if others:
            return f"its {name} maps {_shown(others)} numbers, this model's {_shown(model[name])}: another base model"
    return None


def _shown(shapes: Collection[tuple[int, int]]) -> str:
    return " or ".join(f"{inputs} to {outputs}" for inputs, outputs in sorted(shapes))


def why_vllm_cannot(adapter: AdapterFile, max_lora_rank: int | None) -> str | None:
    """Return why an engine with this `max_lora_rank` cannot answer with an adapter; None where it can.

    A rank of None is that of the adapters which the engine is started for, up to the largest that vLLM allocates.
    """
    if max_lora_rank is None:
        max_lora_rank = LARGEST_LORA_RANK
    if max_lora_rank == 0:
        return "this engine was started without adapters; set engine.max_lora_rank to the rank of its adapters"
    if adapter.rank > max_lora_rank:
        return f"its rank {adapter.rank} is above engine.max_lora_rank {max_lora_rank}; raise that setting"
    if adapter.unusual:
        return (
            f"vLLM cannot apply {', '.join(adapter.unusual)}; use a transformers engine, or serve the merged model "
            "(aft-ray export --merged)"
        )
    return None
