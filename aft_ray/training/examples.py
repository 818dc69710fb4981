"""Whether the examples of a training set are valid for a model, and the order in which batches see them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aft_ray.errors import InputError
from aft_ray.models import tokenizer_hash
from aft_ray.runs import read_manifest
from aft_ray.storage import Folder
from aft_ray.templates import IGNORE, ChatFormat, check_mask

MAX_CHECKED_ROWS = 512
"""Number of rows whose mask is checked before any worker starts. The training_set stage has checked every row."""
BATCHES_PER_GROUP = 64
"""Examples are sorted by length within groups of this many batches: this saves padding and keeps the order random."""


def check_made_for(training_set: Folder, model: str, template_hashes: Mapping[str, str]) -> None:
    """Check that the training set was made with this model's tokenizer and this run's template.

    Raises InputError with both hashes. They come from the manifest; a training set that was made elsewhere has none,
    and then only its rows are checked.
    """
    manifest = read_manifest(training_set)
    made_with = manifest.settings if manifest else {}
    now = {"tokenizer": tokenizer_hash(model), "template": template_hashes.get("aggregator")}
    for what, hash_now in now.items():
        before = made_with.get(what)
        if before is not None and hash_now is not None and before != hash_now:
            raise InputError(
                f"{training_set.location}: made with another {what}: its sha256 was {before[:16]} and is "
                f"{hash_now[:16]} now. Train the model that the set was made for, or make the set again in another "
                "run.dir"
            )


def check_examples(rows: Iterable[Mapping[str, Any]], model: str, chat_template: str | None = None) -> None:
    """Raise InputError for the first example with a broken mask or with ids outside the model's vocabulary."""
    chat_format, vocabulary = _rules(model, chat_template)
    for row in rows:
        try:
            check_example(row["input_ids"], row["labels"], chat_format, vocabulary)
        except InputError as error:
            raise InputError(
                f"training example {row['example_id']}: {error}. Was the training set made with this model's tokenizer?"
            ) from error


def _rules(model: str, chat_template: str | None) -> tuple[ChatFormat, int]:
    """Return the model's chat format and the size of its vocabulary, which examples are checked against."""
    from transformers import AutoConfig

    chat_format = ChatFormat.load(model, style="auto" if chat_template is None else "chat", chat_template=chat_template)
    return chat_format, AutoConfig.from_pretrained(model).get_text_config().vocab_size


def check_example(input_ids: Sequence[int], labels: Sequence[int], chat_format: ChatFormat, vocabulary: int) -> None:
    """Check the invariants of the mask. Without a chat template, prompts may have any form, so fewer of them apply."""
    if input_ids and not 0 <= min(input_ids) <= max(input_ids) < vocabulary:
        raise InputError(f"id {max(input_ids)} is outside the model's vocabulary of {vocabulary}")
    if chat_format.has_template:
        check_mask(input_ids, labels, chat_format, several_answers=True)
        return
    target = [label for label in labels if label != IGNORE]
    start = len(labels) - len(target)
    if not 0 < start < len(labels) or list(input_ids[start:]) != target:
        raise InputError(f"the labels must be {IGNORE} over the prompt and the input ids from the target on")
    if target[-1] not in chat_format.stop_ids:
        raise InputError(f"the end must be inside the loss: last label {target[-1]}, expected {chat_format.stop_ids}")


def check_batch(batch: Any, model: str, chat_template: str | None = None) -> None:
    """Check the mask in a batch as the model sees it, and that no padding is in the loss.

    Raises InputError, which names the example by its place in the batch.
    """
    chat_format, vocabulary = _rules(model, chat_template)
    if "attention_mask" in batch and bool(((batch["labels"] != IGNORE) & (batch["attention_mask"] == 0)).any()):
        raise InputError("the first batch has padding inside the loss")
    for place, (input_ids, labels) in enumerate(examples_of(batch)):
        try:
            check_example(input_ids, labels, chat_format, vocabulary)
        except InputError as error:
            raise InputError(f"the first batch, example {place}: {error}") from error


def examples_of(batch: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (input_ids, labels) of every example, without padding. Packed rows are split where positions restart."""
    for row, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)):
        if "position_ids" in batch:
            starts = [place for place, position in enumerate(batch["position_ids"][row].tolist()) if position == 0]
        else:
            starts, ids = [0], ids[: int(batch["attention_mask"][row].sum())]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[start:end], labels[start:end]


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[int]:
    """Return every index once. Each run of `batch_size` indices is one global batch of examples of similar length.

    This is a pure function of its arguments. So a resumed epoch continues with exactly the next batch, and the number
    of workers that share a global batch does not change its content. transformers' `group_by_length` promises neither.

    >>> batch_order([5, 900, 6, 800], batch_size=2, seed=0, epoch=0)   # {5, 6} and {900, 800}
    """
    chance = random.Random(f"{seed}/{epoch}")
    indices = list(range(len(lengths)))
    chance.shuffle(indices)
    group = batch_size * BATCHES_PER_GROUP
    batches: list[list[int]] = []
    for start in range(0, len(indices), group):
        by_length = sorted(indices[start : start + group], key=lambda index: lengths[index])
        batches += [by_length[place : place + batch_size] for place in range(0, len(by_length), batch_size)]
    chance.shuffle(batches)
    batches.sort(key=lambda batch: len(batch) < batch_size)  # the short batch goes last, where the loader fills it up
    return [index for batch in batches for index in batch]
