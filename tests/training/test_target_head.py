"""The head on target positions alone gives the loss and the gradients of the whole head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from aft_ray.templates import IGNORE
from aft_ray.training.target_head import TargetHead, predicting, target_loss_sum


@pytest.fixture
def model(tiny_model: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.fixture
def batch(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [row for row in examples if row["variant"] == "aft"][:4]
    return DataCollatorForLanguageModeling(pad_token_id=2)(rows)


def full_head_loss_sum(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].reshape(-1)
    return functional.cross_entropy(logits[:, :-1].reshape(len(labels), -1), labels, reduction="sum")


def test_loss_and_gradients_equal_those_of_the_full_head(model: Any, batch: dict[str, torch.Tensor]) -> None:
    full = full_head_loss_sum(model, batch)
    full.backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()

    loss = target_loss_sum(model, TargetHead(model), batch)
    loss.backward()

    torch.testing.assert_close(loss, full)
    assert expected
    for name, weight in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(weight.grad, expected[name], msg=name)


def test_the_head_sees_target_positions_only(model: Any, batch: dict[str, torch.Tensor]) -> None:
    head = TargetHead(model)
    with head.on(batch["labels"]):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    num_targets = int((batch["labels"] != IGNORE).sum())
    assert logits.shape[:2] == (1, num_targets)
    assert num_targets < batch["input_ids"].numel() / 2


def test_outside_of_the_block_the_head_is_whole(model: Any, batch: dict[str, torch.Tensor]) -> None:
    head = TargetHead(model)
    with head.on(batch["labels"]):
        pass
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_a_batch_without_targets_has_loss_zero_and_a_gradient(model: Any, batch: dict[str, torch.Tensor]) -> None:
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    loss = target_loss_sum(model, TargetHead(model), batch)
    loss.backward()
    assert loss.item() == 0


def test_a_position_predicts_where_the_next_label_is_in_the_loss() -> None:
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8], [IGNORE, 5, IGNORE, IGNORE]])
    assert predicting(labels).tolist() == [[False, True, True, False], [True, False, False, False]]
