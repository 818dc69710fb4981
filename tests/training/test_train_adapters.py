"""A real training of a tiny model through Ray Train, DeepSpeed ZeRO-2 and LoRA.

One call is shared by most tests: two workers train both variants.
What they must give is computed here by `plain_curve`: one process, the whole head, plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_ROWS
from torch.nn import functional

from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.errors import ResumeRefused
from aft_ray.storage import Folder
from aft_ray.templates import IGNORE
from aft_ray.training import TrainingJob, TrainProgress, TrainSummary, train_adapters
from aft_ray.training.examples import batch_order
from aft_ray.training.metrics import METRICS
from aft_ray.training.proof import batch_loss

pytestmark = pytest.mark.soak
CONFIG = TrainingConfig(
    num_workers=2,
    batch_size_per_worker=4,
    num_epochs=20,
    learning_rate=5e-3,
    save_steps=10,
    bf16=False,
    lora=LoraSettings(rank=4),
)
GLOBAL_BATCH = 8
NUM_STEPS = 60
SEED = 7


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished job, its summaries and its progress reports."""

    job: TrainingJob
    summaries: dict[str, TrainSummary]
    reports: list[TrainProgress]

    def curve(self, variant: str) -> list[dict[str, Any]]:
        return self.job.checkpoints.child(variant).json_lines(METRICS)


@pytest.fixture(scope="module")
def trained(
    ray_cluster: None, tiny_model: Path, training_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    reports: list[TrainProgress] = []
    job = TrainingJob(
        config=CONFIG,
        model=str(tiny_model),
        training_set=Folder.at(training_set),
        outputs={variant: Folder.at(folder / "model" / variant) for variant in ("sft", "aft")},
        checkpoints=Folder.at(folder / "checkpoints"),
        seed=SEED,
        template_hashes={"aggregator": "h-4711"},
    )
    return Trained(job, train_adapters(job, report=reports.append), reports)


def rows_of(examples: list[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    return [row for row in examples if row["variant"] == variant and row["split"] == "train"]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=2)(rows)


def plain_curve(model: Path, rows: list[dict[str, Any]]) -> list[float]:
    """Return the losses of one process: whole head, mean over target tokens, AdamW, clipping, linear decay."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup, set_seed

    set_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = get_peft_model(base, LoraConfig(r=CONFIG.lora.rank, lora_alpha=16, target_modules="all-linear"))
    weights = [weight for weight in lora.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=CONFIG.learning_rate, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(NUM_STEPS * CONFIG.warmup_ratio), NUM_STEPS)
    lengths = [len(row["input_ids"]) for row in rows]
    orders = (batch_order(lengths, GLOBAL_BATCH, SEED, epoch) for epoch in range(int(CONFIG.num_epochs)))
    seen = [index for order in orders for index in order]
    curve = []
    for start in range(0, len(seen), GLOBAL_BATCH):
        batch = collate([rows[index] for index in seen[start : start + GLOBAL_BATCH]])
        logits = lora(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CONFIG.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("variant", ["sft", "aft"])
def test_the_target_is_learned(variant: str, trained: Trained) -> None:
    summary = trained.summaries[variant]
    assert summary.num_steps == NUM_STEPS
    assert summary.num_rows == NUM_ROWS
    assert summary.resumed_from_step == 0
    assert summary.last_loss < 0.1 * summary.first_loss


@pytest.mark.parametrize("variant", ["sft", "aft"])
def test_two_workers_give_the_losses_of_a_plain_loop(
    variant: str, trained: Trained, tiny_model: Path, examples: list[dict[str, Any]]
) -> None:
    curve = trained.curve(variant)
    expected = plain_curve(tiny_model, rows_of(examples, variant))
    assert [row["step"] for row in curve] == list(range(1, NUM_STEPS + 1))
    assert [row["loss"] for row in curve] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("variant", ["sft", "aft"])
def test_tokens_are_counted_over_both_workers(variant: str, trained: Trained, examples: list[dict[str, Any]]) -> None:
    rows = rows_of(examples, variant)
    epochs = int(CONFIG.num_epochs)
    summary = trained.summaries[variant]
    assert summary.num_tokens == epochs * sum(len(row["input_ids"]) for row in rows)
    assert summary.num_trained_tokens == epochs * sum(label != IGNORE for row in rows for label in row["labels"])
    assert summary.world_size == 2


def test_the_adapter_loads_in_plain_peft_and_answers_as_trained(
    trained: Trained, tiny_model: Path, examples: list[dict[str, Any]]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    batch = collate(rows_of(examples, "aft"))
    untrained = batch_loss(base, batch)
    adapted = PeftModel.from_pretrained(base, trained.summaries["aft"].adapter_path)
    assert batch_loss(adapted, batch) < 0.1 * untrained


def test_the_output_holds_adapter_tokenizer_card_and_nothing_unfinished(trained: Trained, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    output = Path(trained.summaries["sft"].adapter_path)
    names = {file.name for file in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "summary.json"} <= names
    assert not {"README.md", "training_args.bin"} & names
    assert [folder.name for folder in output.parent.iterdir() if "partial" in folder.name] == []
    assert (
        AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    )
    card = (output / "model_card.md").read_text()
    assert str(tiny_model) in card
    assert "h-4711" in card
    assert json.loads((output / "summary.json").read_text())["fingerprint"] in card


def test_progress_goes_from_starting_to_the_last_step(trained: Trained) -> None:
    for variant in ("sft", "aft"):
        own = [state for state in trained.reports if state.variant == variant]
        assert {state.phase for state in own} <= {"starting", "training", "checking"}
        assert own[0].step <= own[-1].step
    assert trained.reports[0].phase == "starting"
    assert trained.reports[-1].step == trained.reports[-1].num_steps == NUM_STEPS
    gaps = [right.seconds - left.seconds for left, right in zip(trained.reports, trained.reports[1:], strict=False)]
    assert max(gaps) < 10


def test_a_second_call_returns_the_stored_summaries_without_training(trained: Trained) -> None:
    began = time.monotonic()
    reports: list[TrainProgress] = []
    assert train_adapters(trained.job, report=reports.append) == trained.summaries
    assert reports == []
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed: was 7, is 8"),
        ({"config": CONFIG.model_copy(update={"learning_rate": 1e-3})}, "training.learning_rate: was 0.005, is 0.001"),
        ({"template_hashes": {"aggregator": "h-4712"}}, "templates.aggregator: was 'h-4711', is 'h-4712'"),
    ],
    ids=["seed", "setting", "template"],
)
def test_other_work_in_the_same_folders_is_refused(change: dict[str, Any], message: str, trained: Trained) -> None:
    job = dataclasses.replace(trained.job, outputs={"sft": trained.job.outputs["sft"]}, **change)
    with pytest.raises(ResumeRefused, match=message):
        train_adapters(job)


def test_where_it_runs_is_no_part_of_what_it_is(trained: Trained) -> None:
    workers = {"num_workers": 1, "batch_size_per_worker": GLOBAL_BATCH, "deepspeed": "none"}  # it is finished
    for update in ({"max_failures": 9, "cpus_per_worker": 2}, workers):
        config = CONFIG.model_copy(update=update)
        assert train_adapters(dataclasses.replace(trained.job, config=config)) == trained.summaries
