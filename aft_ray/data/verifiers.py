"""Checks answers to tasks that a program can judge. A verifier returns a number from 0 to 1, and 1.0 means correct.

task           the number is                                                   and the row needs
constraints    the share of the prompt's constraints that the answer meets     metadata.constraints
numeric        1 if the answer's final number equals the reference's, else 0   reference
reasoning_gym  the score of the task's own scorer                              metadata.reasoning_gym
ifeval         the share of the prompt's IFEval instructions that are followed metadata.instruction_id_list, kwargs

verify(row, "- tea\\n- milk")     # True, False, or None if the row's task has no verifier
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from aft_ray.data.constraints import share_met
from aft_ray.data.scoring import Row, Score
from aft_ray.errors import ConfigError, InputError
from aft_ray.inference.answers import final_number
from aft_ray.records import metadata_of

logger = logging.getLogger(__name__)


def score_constraints(row: Row, text: str) -> float:
    """Return the share of the row's constraints that `text` meets."""
    metadata = metadata_of(row)
    if "constraints" not in metadata:
        raise InputError("no constraints in the row's metadata")
    return share_met(metadata["constraints"], text)


def score_numeric(row: Row, text: str) -> float:
    """Return 1.0 if the final numbers of `text` and the reference are equal; a text without a number scores 0.0."""
    expected = final_number(row.get("reference") or "")
    if expected is None:
        raise InputError(f"no number in the reference {row.get('reference')!r}")
    return float(final_number(text) == expected)


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


def score_ifeval(row: Row, text: str) -> float:
    """Return the share of the row's IFEval instructions that `text` follows ("strict"); 1.0 is prompt-level strict.

    The checkers are lm-eval's copy of Google's (arXiv 2311.07911); the metadata has the layout of their
    `input_data.jsonl`.
    """
    metadata = metadata_of(row)
    if not metadata.get("instruction_id_list") or "kwargs" not in metadata:
        raise InputError("no instruction_id_list and kwargs in the row's metadata")
    checkers = _ifeval_checkers()
    example = checkers.InputExample(
        key=0,
        instruction_id_list=metadata["instruction_id_list"],
        prompt=row["messages"][-1]["content"],
        kwargs=metadata["kwargs"],
    )
    try:
        followed = checkers.test_instruction_following_strict(example, text).follow_instruction_list
    except KeyError as error:
        raise InputError(f"the installed checkers do not know instruction {error}") from None
    except LookupError as error:  # nltk explains a missing data file on a whole page
        raise InputError(f"nltk data is missing: {' '.join(str(error).replace('*', '').split())[:200]}") from None
    return sum(followed) / len(followed)


@lru_cache(maxsize=1)
def _ifeval_checkers() -> Any:
    try:
        import langdetect
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise ConfigError(f"the IFEval checkers are not installed ({error}); pip install aft-ray[ifeval]") from None
    langdetect.DetectorFactory.seed = 0  # otherwise langdetect guesses the language of a short text at random
    return utils


VERIFIERS: dict[str, Callable[[Row, str], float]] = {
    "constraints": score_constraints,
    "numeric": score_numeric,
    "reasoning_gym": score_reasoning_gym,
    "ifeval": score_ifeval,
}
"""The verifier of each task."""


def verify(row: Row, text: str) -> bool | None:
    """Return whether the verifier of the row's task accepts `text`, or None if there is none or it raised an error."""
    verifier = VERIFIERS.get(row.get("task") or "")
    if verifier is None:
        return None
    value = score_text("verify", verifier, row, text).value
    return None if value is None else value >= 1.0


def score_text(name: str, function: Callable[[Row, str], float], row: Row, text: str) -> Score:
    """Score one text with `function`; if it raises, the error becomes the reason, so that one text ends no stage."""
    try:
        return Score(value=function(row, text))
    except ConfigError:  # a package is missing, and every other row would fail the same way
        raise
    except Exception as error:  # foreign code reads model output here, and anything may happen
        logger.warning("scorer %s, prompt %s: %r", name, row.get("prompt_id"), error)
        return Score(value=None, reason=f"{type(error).__name__}: {error}")
