"""`aft-ray export`: writes a finished training to a self-contained folder.

    aft-ray export --config configs/quickstart.yaml --variant aft --output exports/aft
    aft-ray export --config configs/quickstart.yaml --variant aft --merged --output exports/aft-merged

    as trained    a copy of the run's model/<variant>: adapter (whole model after full fine-tuning), tokenizer, card
    merged        the base model with the adapter merged into its weights: config.json, *.safetensors, tokenizer, card

Both have a generation_config.json that ends generation at the token which ends the training targets, so plain
transformers and vLLM stop there too. The tokenizer files are those of the run, byte for byte.

The merge runs on the CPU in float32 and needs memory for one copy of the model in that dtype. The result is saved in
the dtype of the base model. In bfloat16 this loses precision: with 8 significant bits, neighbouring values differ by up
to 0.8 %, and an adapter changes most weights by less than half of that. Rounding to the nearest value would lose all of
these changes, and about half of what a short training achieved (LOG.md). So weights are rounded stochastically, with a
fixed seed: each moves by less than one step, and the outputs of a layer are right on average. After QLoRA, the adapter
is merged into the base model's own weights, not into the 4-bit weights that it was trained on.

A merged model must pass the same proof as a trained one: after reloading, its loss on the shortest training examples
equals that of base model and adapter, all computed in float32.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.config import Config
from aft_ray.errors import ConfigError, InputError, TrainingFailed
from aft_ray.hub import split
from aft_ray.models import resolve_model
from aft_ray.runs import difference
from aft_ray.storage import PARTIAL, Folder, local_copy, whole_folder
from aft_ray.templates import ChatFormat
from aft_ray.training.adapter import CARD, SUMMARY, model_card
from aft_ray.training.identity import base_name, model_identity
from aft_ray.training.rows import lengths_of, open_rows, shortest, write_rows
from aft_ray.training.task import TrainSummary

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
NUM_PROOF_EXAMPLES = 8
"""Number of examples in that proof: enough for rounding errors to average out."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished training of one variant."""

    variant: str
    folder: Path
    """The folder model/<variant> of the run."""
    stored: Mapping[str, Any]
    """The content of its summary.json."""
    config: Config
    """The configuration of the run."""

    @property
    def is_adapter(self) -> bool:
        """Whether the folder is an adapter. After full fine-tuning it is a whole model, with nothing to merge."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @property
    def base(self) -> str:
        """Local folder or hub id of the base model. Raises ConfigError for a model other than the one trained on."""
        engine = self.config.engine
        if engine.type not in {"vllm", "transformers"}:
            raise ConfigError(
                f"engine.type {engine.type}: set engine to the local model that was trained (vllm or transformers)"
            )
        stored = self.stored["settings"]["model"]
        name, revision = base_name(stored, engine.model)
        is_trained_one = revision is not None and split(engine.model)[0] == name  # at the commit of the training
        base = resolve_model(f"{name}#{revision}" if is_trained_one else engine.model)
        if model_identity(base) != self.stored["settings"]["model"]:
            raise ConfigError(
                f"engine.model {engine.model} is not the model that {self.folder} was trained on:\n"
                f"{difference(self.stored['settings']['model'], model_identity(base))}"
            )
        return base


def find_trained(config: Config, variant: str | None, train_command: str) -> Trained:
    """Return the run's training of `variant`; with None, of its only variant.

    Raises InputError, with `train_command`, where it is not trained yet, and ConfigError where there are several.
    """
    models = Folder.at(config.run.dir).child("model")
    names = [name for name in models.folder_names() if not name.endswith(PARTIAL)]
    there = [name for name in names if models.child(name).exists(SUMMARY)]
    if not there:
        raise InputError(f"{models.location}: nothing is trained yet; run: {train_command}")
    if variant is None and len(there) > 1:
        raise ConfigError(f"{models.location} holds several variants ({', '.join(there)}): name one with --variant")
    variant = variant or there[0]
    if variant not in there:
        raise InputError(
            f"--variant {variant}: not trained in {models.location}; there: {', '.join(there)}. "
            f"With {variant} in training_set.variants, run: {train_command}"
        )
    folder = local_copy(models.child(variant).location)
    return Trained(variant=variant, folder=folder, stored=json.loads((folder / SUMMARY).read_text()), config=config)


def export_model(trained: Trained, output: Path, merged: bool = False) -> bool:
    """Write the folder `output`, whole or not at all. Return False where it holds this export already.

    Raises ConfigError where `output` holds anything else, and TrainingFailed where the loss of the merged model differs
    from that of base model and adapter.
    """
    output = output.expanduser().absolute()
    merges = merged and trained.is_adapter
    if output.exists():
        if _holds(output, trained, has_adapter=trained.is_adapter and not merges):
            return False
        raise ConfigError(f"--output {output} exists and is not this export: name another folder, or remove this one")
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
    """Return whether a complete folder is an export of this training, of the given form."""
    if not (output / SUMMARY).is_file() or not (output / GENERATION_CONFIG).is_file():
        return False
    is_from_here = (output / SUMMARY).read_bytes() == (trained.folder / SUMMARY).read_bytes()
    return is_from_here and (output / ADAPTER_CONFIG).is_file() == has_adapter


def generation_config(model: str, tokenizer: Path) -> GenerationConfig:
    """Return the model's own configuration, with the ids that end an answer first in `eos_token_id`."""
    from transformers import AutoConfig, GenerationConfig

    try:
        config = GenerationConfig.from_pretrained(model)
    except OSError:  # the model has none
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop_ids = (*ChatFormat.load(str(tokenizer)).stop_ids, *own)
    config.eos_token_id = list(dict.fromkeys(index for index in stop_ids if index is not None))
    return config


def _merge(trained: Trained, base: str, folder: Path) -> dict[str, Any]:
    """Save the merged model into `folder`, prove it, and return the section of its model card."""
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
    """Round a float32 weight to `dtype`: to bfloat16 stochastically, without bias; to others, to the nearest value.

    A bfloat16 is the upper half of a float32, so a random number that is added to the lower half carries over with the
    right probability. Values that bfloat16 can represent stay as they are.
    """
    import torch

    if dtype != torch.bfloat16:
        return weight.to(dtype)
    bits = weight.contiguous().view(torch.int32)
    bits = bits + torch.randint(0, 1 << 16, bits.shape, generator=chance, dtype=torch.int32)
    return (bits & -(1 << 16)).view(torch.float32).to(dtype)


def _shortest_examples(trained: Trained) -> dict[str, torch.Tensor]:
    """Return the shortest training examples as a padded batch."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    training_set = Folder.at(trained.config.run.dir).child("training_set")
    lengths_of(training_set, trained.variant)  # raises InputError where there are none
    with tempfile.TemporaryDirectory(prefix="aft-ray-") as scratch:
        file = Path(scratch) / "rows.arrow"
        write_rows(training_set, trained.variant, None, file)
        rows = shortest(open_rows(file), NUM_PROOF_EXAMPLES)
    batch: dict[str, torch.Tensor] = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    return batch


def _card(trained: Trained, merging: Mapping[str, Any]) -> str:
    """Return the model card of the training, with a section about the merge."""
    engine: Any = trained.config.engine
    stored = trained.stored
    summary = TrainSummary(**stored["summary"])
    return model_card(stored["settings"], engine.model, summary, stored.get("versions", {}), merging)
