"""An adapter that was not trained as planned does not pass the proof."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from aft_ray.config import TrainingConfig
from aft_ray.errors import TrainingFailed
from aft_ray.storage import Folder
from aft_ray.training import proof
from aft_ray.training.failures import reason
from aft_ray.training.task import TrainTask
from aft_ray.training.trainer import WeightSums


@pytest.fixture
def task(tmp_path: Path) -> TrainTask:
    return TrainTask(
        variant="sft",
        output=Folder.at(tmp_path / "model"),
        checkpoints=Folder.at(tmp_path / "checkpoints"),
        settings={"training": {"bf16": False}},
        num_rows=8,
        num_steps=2,
    )


@pytest.fixture
def lora(tiny_model: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.fixture
def batch(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    return DataCollatorForLanguageModeling(pad_token_id=2)(examples[:2])


FP32 = TrainingConfig(bf16=False)


def ending(batch: dict[str, torch.Tensor], loss: float) -> proof.Ending:
    return proof.Ending(num_steps=2, changed_frozen=[], is_unchanged=False, batch=batch, loss=loss)


def rows(*losses: float) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


def test_the_planned_steps_with_finite_losses_pass(task: TrainTask) -> None:
    proof.check_steps(task, 2, rows(3.0, 2.0))
    proof.check_steps(task, 1, rows(3.0), stopped_early=True)
    with pytest.raises(TrainingFailed, match="1 optimizer steps taken and 2 logged"):
        proof.check_steps(task, 1, rows(3.0, 2.0), stopped_early=True)


@pytest.mark.parametrize(
    ("steps", "losses", "message"),
    [
        (0, (), "0 optimizer steps taken and 0 logged, 2 planned"),
        (1, (3.0,), "1 optimizer steps taken"),
        (2, (3.0,), "1 logged"),
        (1, (float("nan"),), "loss is nan at step 1; lower training.learning_rate"),
        (2, (3.0, float("inf")), "loss is inf at step 2"),
    ],
)
def test_missing_steps_and_broken_losses_fail(
    steps: int, losses: tuple[float, ...], message: str, task: TrainTask
) -> None:
    with pytest.raises(TrainingFailed, match=message):
        proof.check_steps(task, steps, rows(*losses))


def test_a_saved_adapter_passes_and_gives_its_loss_again(
    task: TrainTask, lora: Any, batch: dict[str, torch.Tensor], tiny_model: Path, tmp_path: Path
) -> None:
    lora.save_pretrained(tmp_path / "a")
    proof.check_adapter(task, tmp_path / "a", None)
    proof.check_reload(task, FP32, str(tiny_model), tmp_path / "a", ending(batch, proof.batch_loss(lora, batch)))


def test_an_adapter_that_changed_between_training_and_disk_fails(
    task: TrainTask, lora: Any, batch: dict[str, torch.Tensor], tiny_model: Path, tmp_path: Path
) -> None:
    expected = proof.batch_loss(lora, batch)
    for name, weight in lora.named_parameters():
        if "lora_B" in name:
            weight.data.mul_(0.9)
    lora.save_pretrained(tmp_path / "a")
    with pytest.raises(TrainingFailed, match="reloaded, has loss"):
        proof.check_reload(task, FP32, str(tiny_model), tmp_path / "a", ending(batch, expected))


def test_an_untrained_lora_fails(task: TrainTask, tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "a")
    with pytest.raises(TrainingFailed, match="14 LoRA tensors did not change"):
        proof.check_adapter(task, tmp_path / "a", None)


def test_an_adapter_equal_to_the_one_it_began_from_fails(task: TrainTask, lora: Any, tmp_path: Path) -> None:
    lora.save_pretrained(tmp_path / "a")
    with pytest.raises(TrainingFailed, match="did not change"):
        proof.check_adapter(task, tmp_path / "a", tmp_path / "a")


@pytest.mark.parametrize(
    "tensors", [{}, {"x.lora_B.weight": torch.zeros(0)}, {"x.lora_B.weight": torch.tensor([float("nan")])}]
)
def test_an_empty_or_broken_adapter_fails(tensors: dict[str, torch.Tensor], task: TrainTask, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(TrainingFailed, match="the saved adapter"):
        proof.check_adapter(task, tmp_path, None)


def test_a_frozen_weight_that_moves_is_named_and_trained_ones_must_move(task: TrainTask, lora: Any) -> None:
    sums = WeightSums()
    sums.on_train_begin(None, None, None, model=lora)
    assert len(sums.frozen) >= 8
    assert sums.changed_frozen(lora) == []
    assert sums.is_unchanged(lora)
    name = next(iter(sums.frozen))
    lora.get_parameter(name).data.view(-1)[0] += 1e-3
    lora.get_parameter(next(iter(sums.trained))).data.view(-1)[0] += 1e-3
    assert sums.changed_frozen(lora) == [name]
    assert not sums.is_unchanged(lora)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changed_frozen": ["embed"]}, "frozen weights changed: embed"),
        ({"is_unchanged": True}, "no trained weight changed in 2 steps"),
        ({"num_steps": 1}, "1 optimizer steps taken"),
    ],
)
def test_a_training_that_left_the_model_wrong_fails(task: TrainTask, change: dict[str, Any], message: str) -> None:
    proof.check_ending(task, ending({}, 1.0), rows(3.0, 2.0))
    with pytest.raises(TrainingFailed, match=message):
        proof.check_ending(task, dataclasses.replace(ending({}, 1.0), **change), rows(3.0, 2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker 1: torch.OutOfMemoryError: CUDA out of memory", "out of memory: run the same command with"),
        ("DefaultCPUAllocator: can't allocate memory", "out of memory"),
        ("ray.exceptions.ActorDiedError: The actor died unexpectedly", "died more than training.max_failures 2 times"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ValueError: odd", "training stopped: ValueError: odd"),
    ],
)
def test_a_failed_run_is_told_in_one_sentence(text: str, message: str) -> None:
    assert message in reason(RuntimeError(text), TrainingConfig())
