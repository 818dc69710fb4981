"""A two-layer Llama with a tokenizer of two dozen words, and a training set in the form of the training_set stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import examples_of, write_model, write_training_set


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with random float32 weights. As in SmolLM2, one token pads and ends a turn."""
    return write_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def examples(tiny_model: Path) -> list[dict[str, Any]]:
    """The rows of two variants: prompts of many lengths with one answer, and held-out rows with another one."""
    return examples_of(tiny_model)


@pytest.fixture(scope="session")
def training_set(examples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set that holds the rows in two shards."""
    return write_training_set(tmp_path_factory.mktemp("training_set"), examples)
