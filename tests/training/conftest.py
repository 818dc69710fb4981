"""A two-layer Llama with a tokenizer of two dozen words, and a training set in the form of the training_set stage."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tiny import ANSWER, NUM_ROWS, WORDS, write_model, write_training_set

from aft_ray.records import HELD_OUT, TRAIN
from aft_ray.templates import ChatFormat, build_example


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random float32 weights. As in SmolLM2, one token pads and ends a turn."""
    return write_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def examples(tiny_model: Path) -> list[dict[str, Any]]:
    """The rows of two variants: prompts of many lengths with one answer, and held-out rows with another one."""
    chat_format = ChatFormat.load(str(tiny_model))
    chance = random.Random(0)
    rows = []
    for variant, longest in (("sft", 12), ("aft", 40)):
        for number in range(NUM_ROWS + 2):
            held_out = number >= NUM_ROWS
            words = " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, longest)))
            messages: Any = [{"role": "user", "content": words}]
            target = "a a a a" if held_out else ANSWER
            input_ids, labels = build_example(
                chat_format.prompt_ids(messages), chat_format.target_ids(messages, target)
            )
            rows.append(
                {
                    "example_id": f"p-{number}-{variant}",
                    "prompt_id": f"p-{number}",
                    "variant": variant,
                    "split": HELD_OUT if held_out else TRAIN,
                    "input_ids": input_ids,
                    "labels": labels,
                    "prompt_text": words,
                    "target_text": target,
                    "length_action": None,
                }
            )
    return rows


@pytest.fixture(scope="session")
def training_set(examples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set that holds the rows in two shards."""
    return write_training_set(tmp_path_factory.mktemp("training_set"), examples)
