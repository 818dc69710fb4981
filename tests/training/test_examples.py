"""Which rows are read from a training set, which are refused, and in which order training sees them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_ROWS, write_training_set

from aft_ray.config import TrainingConfig
from aft_ray.errors import InputError, ResumeRefused
from aft_ray.models import tokenizer_hash
from aft_ray.runs import Manifest, write_manifest
from aft_ray.storage import Folder
from aft_ray.templates import IGNORE
from aft_ray.training import TrainingJob, train_adapters
from aft_ray.training.examples import batch_order, check_batch, check_made_for
from aft_ray.training.rows import first_examples


def train(model: Path, training_set: Path, folder: Path, variant: str = "sft") -> None:
    job = TrainingJob(
        config=TrainingConfig(),
        model=str(model),
        training_set=Folder.at(training_set),
        outputs={variant: Folder.at(folder / "model" / variant)},
        checkpoints=Folder.at(folder / "checkpoints"),
        seed=1,
    )
    train_adapters(job)


def test_only_the_training_split_of_the_variant_is_read(training_set: Path) -> None:
    ids = [row["example_id"] for row in first_examples(Folder.at(training_set), "aft", 1000)]
    assert ids == [f"p-{number}-aft" for number in range(NUM_ROWS)]


def test_a_folder_without_shards_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \*\.parquet shards"):
        train(tiny_model, tmp_path, tmp_path)


def test_an_unknown_variant_is_refused_with_the_ones_that_are_there(
    tiny_model: Path, training_set: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"variant 'no_proposals'.*\['aft', 'sft'\]"):
        train(tiny_model, training_set, tmp_path, "no_proposals")


def unmask_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": row["input_ids"]}


def drop_end(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [*row["labels"][:-1], IGNORE]}


def drop_first_target(row: dict[str, Any]) -> dict[str, Any]:
    start = row["labels"].count(IGNORE)
    return {**row, "labels": [IGNORE] * (start + 1) + row["labels"][start + 1 :]}


def foreign_id(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "input_ids": [49000, *row["input_ids"][1:]]}


@pytest.mark.parametrize("breaks", [unmask_prompt, drop_end, drop_first_target, foreign_id])
def test_a_broken_example_is_refused_before_anything_starts(
    breaks: Any, tiny_model: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [breaks(row) if row["example_id"] == "p-3-sft" else row for row in examples]
    broken = write_training_set(tmp_path / "broken", rows)
    with pytest.raises(InputError, match="training example p-3-sft"):
        train(tiny_model, broken, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_an_output_that_is_no_adapter_is_refused(tiny_model: Path, training_set: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "sft").mkdir(parents=True)
    with pytest.raises(ResumeRefused, match=r"holds no summary\.json of a trained adapter"):
        train(tiny_model, training_set, tmp_path)


def test_the_collator_keeps_the_end_in_the_loss_though_it_is_the_padding_token(
    examples: list[dict[str, Any]], tiny_model: Path
) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    end = 2
    batch = DataCollatorForLanguageModeling(pad_token_id=end)(examples[:6])
    check_batch(batch, str(tiny_model))
    assert (batch["attention_mask"] == 0).any()
    assert ((batch["labels"] == end).sum(dim=1) == 1).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE).all()


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("breaks", [unmask_prompt, drop_end, drop_first_target, foreign_id])
def test_a_broken_example_is_found_in_the_batch_that_the_model_sees(
    breaks: Any, padding_free: bool, examples: list[dict[str, Any]], tiny_model: Path
) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    def batch_of(rows: list[dict[str, Any]]) -> Any:
        keys = ("input_ids", "labels")
        if padding_free:
            lengths = [len(row["input_ids"]) for row in rows]
            joined = {key: list(itertools.chain.from_iterable(row[key] for row in rows)) for key in keys}
            rows = [{**joined, "seq_lengths": lengths}]
        return DataCollatorForLanguageModeling(pad_token_id=2, padding_free=padding_free)(rows)

    check_batch(batch_of(examples[:3]), str(tiny_model))
    if padding_free and breaks is unmask_prompt:  # the collator itself masks an example's first token
        return
    with pytest.raises(InputError, match="the first batch, example 1: "):
        check_batch(batch_of([examples[0], breaks(examples[1]), examples[2]]), str(tiny_model))


def test_a_batch_with_padding_in_the_loss_is_refused(tiny_model: Path) -> None:
    ids = torch.tensor([[5, 6, 2, 2]])
    batch = {
        "input_ids": ids,
        "labels": torch.tensor([[IGNORE, 6, 2, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
    }
    with pytest.raises(InputError, match="padding inside the loss"):
        check_batch(batch, str(tiny_model))


LENGTHS = [number * 37 % 101 for number in range(100)]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64, 200])
def test_an_epoch_sees_every_example_once(batch_size: int) -> None:
    assert sorted(batch_order(LENGTHS, batch_size, seed=1, epoch=0)) == list(range(100))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = batch_order(LENGTHS, 8, seed=1, epoch=0)
    assert first == batch_order(LENGTHS, 8, seed=1, epoch=0)
    assert first != batch_order(LENGTHS, 8, seed=1, epoch=1)
    assert first != batch_order(LENGTHS, 8, seed=2, epoch=0)


def test_batches_hold_examples_of_like_length_in_no_order_of_length() -> None:
    order = batch_order(LENGTHS, 10, seed=1, epoch=0)
    batches = [[LENGTHS[index] for index in order[start : start + 10]] for start in range(0, 100, 10)]
    assert all(max(batch) - min(batch) <= 12 for batch in batches)
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)


@pytest.mark.parametrize(
    ("rows", "workers", "batch", "accumulate", "epochs", "steps"),
    [(64, 2, 4, 1, 1, 8), (65, 2, 4, 1, 1, 9), (64, 1, 4, 3, 1, 6), (10, 2, 8, 1, 1, 1), (22, 1, 8, 1, 2.5, 8)],
)
def test_steps_are_planned_as_the_trainer_takes_them(
    rows: int, workers: int, batch: int, accumulate: int, epochs: float, steps: int
) -> None:
    config = TrainingConfig(
        num_workers=workers,
        batch_size_per_worker=batch,
        gradient_accumulation_steps=accumulate,
        num_epochs=epochs,
    )
    assert config.planned_steps(rows) == steps
    assert config.model_copy(update={"max_steps": 3}).planned_steps(rows) == 3


@pytest.mark.parametrize("what", ["tokenizer", "template"])
def test_a_set_made_with_another_tokenizer_or_template_is_refused_with_both_hashes(
    what: str, tiny_model: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = write_training_set(tmp_path, examples)
    hashes = {"tokenizer": tokenizer_hash(str(tiny_model)), "template": "a" * 64}

    def write(settings: dict[str, str]) -> None:
        manifest = Manifest(stage="training_set", status="done", fingerprint="", settings=settings)
        write_manifest(Folder.at(folder), manifest)

    check_made_for(Folder.at(folder), str(tiny_model), {"aggregator": "a" * 64})  # made elsewhere: no manifest
    write(hashes)
    check_made_for(Folder.at(folder), str(tiny_model), {"aggregator": "a" * 64})
    write({**hashes, what: "b" * 64})
    now = hashes[what][:16]
    with pytest.raises(InputError, match=f"another {what}: its sha256 was {'b' * 16} and is {now}"):
        check_made_for(Folder.at(folder), str(tiny_model), {"aggregator": "a" * 64})


def test_the_tokenizers_identity_is_its_files_and_its_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "same")
    assert tokenizer_hash(str(tmp_path / "same")) == tokenizer_hash(str(tiny_model))
    (tmp_path / "same" / "chat_template.jinja").write_text("another one")
    assert tokenizer_hash(str(tmp_path / "same")) != tokenizer_hash(str(tiny_model))
    assert tokenizer_hash("a/b") != tokenizer_hash("a/c")
