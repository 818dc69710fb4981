"""`aft-ray export`: a finished training as a folder that stands alone.

    aft-ray export --config configs/quickstart.yaml --variant aft --output exports/aft
    aft-ray export --config configs/quickstart.yaml --variant aft --merged --output exports/aft-merged

    as trained    the run's model/<variant>, copied: adapter (or, after full fine-tuning, whole model), tokenizer, card
    merged        the base model with the adapter in its weights: config.json, *.safetensors, tokenizer, card

Both have a generation_config.json in which the token that ends an answer stops generation, so plain transformers and
vLLM stop where the training targets did. The tokenizer files are the run's own, byte for byte.

Merging happens on the CPU in float32, and takes the memory of one copy of the model in that dtype; the result is
saved in the dtype the base model is stored in. In bfloat16 that loses something: its 8 significant bits leave steps of
up to 0.8 % between weights, and an adapter changes most weights by less than half a step. Rounded to the nearest step
those changes are all lost, and with them about half of what a short training achieved (LOG.md). So weights are rounded
up or down by chance (seeded), in proportion to where they lie between two steps: each is off by less than a step, and
what a layer computes is right on average. After QLoRA the adapter is merged into the base model's own weights, not into
the 4-bit ones it was trained on.

A merged model is proved as a trained one is: reloaded, it has the loss that base model and adapter have on the shortest
training examples, all computed in float32.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.config import Config
from aft_ray.errors import ConfigError, InputError, TrainingFailed
from aft_ray.models import resolve_model
from aft_ray.runs import difference
from aft_ray.storage import PARTIAL, Folder, whole_folder
from aft_ray.templates import ChatFormat
from aft_ray.training.adapter import CARD, SUMMARY, model_card
from aft_ray.training.examples import read_examples, shard_files
from aft_ray.training.task import TrainSummary, model_identity

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
NUM_PROOF_EXAMPLES = 8
"""Enough for the errors of rounding to average out."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One finished training of a run."""

    variant: str
    folder: Path
    """The run's model/<variant>."""
    stored: Mapping[str, Any]
    """Its summary.json."""
    config: Config
    """The run's."""

    @property
    def is_adapter(self) -> bool:
        """False after full fine-tuning: the folder is a whole model, and there is nothing to merge."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def base(self) -> str:
        """Local folder or hub id of the base model. Raises ConfigError where it is not the one trained on."""
        engine = self.config.engine
        if engine.type not in {"vllm", "transformers"}:
            raise ConfigError(f"engine.type {engine.type}: name the local model that was trained (vllm, transformers)")
        base = resolve_model(engine.model)
        if model_identity(base) != self.stored["settings"]["model"]:
            raise ConfigError(
                f"engine.model {engine.model} is not the model that {self.folder} was trained on:\n"
                f"{difference(self.stored['settings']['model'], model_identity(base))}"
            )
        return base


def find_trained(config: Config, variant: str | None, train_command: str) -> Trained:
    """The run's training of `variant`; None: the only one there is.

    Raises InputError, with `train_command`, where it is not trained yet, and ConfigError where one has to be named.
    """
    run = Path(Folder.at(config.run.dir).path)
    there = sorted(summary.parent.name for summary in run.glob(f"model/*/{SUMMARY}"))
    there = [name for name in there if not name.endswith(PARTIAL)]
    if not there:
        raise InputError(f"{run}/model: nothing is trained yet; run: {train_command}")
    if variant is None and len(there) > 1:
        raise ConfigError(f"{run}/model holds several variants ({', '.join(there)}): name one with --variant")
    variant = variant or there[0]
    if variant not in there:
        raise InputError(
            f"--variant {variant}: not trained in {run}/model; there: {', '.join(there)}. "
            f"With {variant} in training_set.variants, run: {train_command}"
        )
    folder = run / "model" / variant
    return Trained(variant=variant, folder=folder, stored=json.loads((folder / SUMMARY).read_text()), config=config)


def export_model(trained: Trained, output: Path, merged: bool = False) -> bool:
    """Write the folder `output`, whole or not at all; False where it holds this very export already.

    Raises ConfigError where `output` holds anything else, and TrainingFailed where the merged model is not the one
    that was trained.
    """
    output = output.expanduser().absolute()
    merges = merged and trained.is_adapter
    if output.exists():
        if _holds(output, trained, has_adapter=trained.is_adapter and not merges):
            return False
        raise ConfigError(f"--output {output} is there and is not this export: name another folder, or remove this one")
    base = trained.base if trained.is_adapter else str(trained.folder)
    left_out = shutil.ignore_patterns("adapter_*") if merges else None
    with whole_folder(output) as folder:
        shutil.copytree(trained.folder, folder, ignore=left_out, dirs_exist_ok=True)
        if merges:
            merging = _merge(trained, base, folder)
            (folder / CARD).write_text(_card(trained, merging))
        (folder / GENERATION_CONFIG).write_text(generation_config(base, folder).to_json_string(ignore_metadata=True))
    return True


def _holds(output: Path, trained: Trained, has_adapter: bool) -> bool:
    """A folder that has its name is whole, so it is told by the training it is from and by its form."""
    if not (output / SUMMARY).is_file() or not (output / GENERATION_CONFIG).is_file():
        return False
    is_from_here = (output / SUMMARY).read_bytes() == (trained.folder / SUMMARY).read_bytes()
    return is_from_here and (output / ADAPTER_CONFIG).is_file() == has_adapter


def generation_config(model: str, tokenizer: Path) -> GenerationConfig:
    """The model's own, with the ids that end an answer first among `eos_token_id`."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # it has none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop_ids = (*ChatFormat.load(str(tokenizer)).stop_ids, *own)
    config.eos_token_id = list(dict.fromkeys(index for index in stop_ids if index is not None))
    return config


def _merge(trained: Trained, base: str, folder: Path) -> dict[str, Any]:
    """Save the merged model into `folder` and prove it; what the card says of it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from aft_ray.training.proof import batch_loss, same_loss

    batch = _shortest_examples(trained)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dtypes = {name: weight.dtype for name, weight in model.named_parameters(remove_duplicate=False)}
    dtype = str(model.dtype).removeprefix("torch.")
    model = PeftModel.from_pretrained(model.float(), str(trained.folder))
    expected = batch_loss(model, batch)
    model = model.merge_and_unload()
    chance = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        weight.data = rounded(weight.data, dtypes[name], chance)
    model.save_pretrained(folder)
    del model
    gc.collect()
    found = batch_loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch)
    if not same_loss(found, expected, dtype):
        raise TrainingFailed(
            f"variant {trained.variant}: merged and saved in {dtype}, the model has loss {found:.5f} on a batch where "
            f"base model and adapter have {expected:.5f}; export the adapter instead (without --merged)"
        )
    return {"dtype": dtype, "loss of base model + adapter": round(expected, 5), "loss when reloaded": round(found, 5)}


def rounded(weight: torch.Tensor, dtype: torch.dtype, chance: torch.Generator) -> torch.Tensor:
    """A float32 weight in `dtype`: to bfloat16 stochastically, with the weight itself as expected value, else to the
    nearest value.

    A bfloat16 is the upper half of a float32, so a random number added to the lower half carries over as often as it
    should. What bfloat16 holds exactly stays as it is.
    """
    import torch

    if dtype != torch.bfloat16:
        return weight.to(dtype)
    bits = weight.contiguous().view(torch.int32)
    bits = bits + torch.randint(0, 1 << 16, bits.shape, generator=chance, dtype=torch.int32)
    return (bits & -(1 << 16)).view(torch.float32).to(dtype)


def _shortest_examples(trained: Trained) -> dict[str, torch.Tensor]:
    """As a padded batch."""
    import pyarrow.compute as pc
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    training_set = Path(Folder.at(trained.config.run.dir).path) / "training_set"
    shard_files(training_set)  # raises InputError where there are none
    rows = read_examples(training_set, trained.variant).select(["input_ids", "labels"])
    by_length = pc.sort_indices(pc.list_value_length(rows["input_ids"]))
    shortest = rows.take(by_length[:NUM_PROOF_EXAMPLES]).to_pylist()
    batch: dict[str, torch.Tensor] = DataCollatorForLanguageModeling(pad_token_id=0)(shortest)
    return batch


def _card(trained: Trained, merging: Mapping[str, Any]) -> str:
    """The training's card, with how the merging went."""
    engine: Any = trained.config.engine
    stored = trained.stored
    summary = TrainSummary(**stored["summary"])
    return model_card(stored["settings"], engine.model, summary, stored.get("versions", {}), merging)
