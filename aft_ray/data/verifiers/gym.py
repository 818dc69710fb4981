"""Verifier `reasoning_gym`: the scorer of the procedural task that made the prompt."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from aft_ray.data.scoring import Row
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import metadata_of


def score_reasoning_gym(row: Row, text: str) -> float:
    """Return the task's own score of the text in the last `<answer>` tag, or of the whole text."""
    recipe = metadata_of(row).get("reasoning_gym")
    if not recipe:
        raise InputError("no reasoning_gym item in the row's metadata")
    dataset = _reasoning_gym_dataset(recipe["name"], recipe["size"], recipe["seed"])
    entry = dataset[recipe["index"]]
    if entry["question"] != row["messages"][-1]["content"]:
        raise InputError(
            "the installed reasoning_gym generates another question for this item; install the version that made it"
        )
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return float(dataset.score_answer(answer, entry))


@lru_cache(maxsize=64)
def _reasoning_gym_dataset(name: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError("reasoning_gym is not installed; pip install aft-ray[tasks]") from None
    return reasoning_gym.create_dataset(name, size=size, seed=seed)
