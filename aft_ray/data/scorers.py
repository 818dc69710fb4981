"""Scorers: a number for each proposal of a prompt, or None with the reason. Nothing is ever made up.

    scorer         what the number is                                              needs on the row
    constraints    share of the prompt's constraints that are met, 0 to 1          metadata.constraints
    numeric        1 when the final number equals the reference's, else 0          reference
    reasoning_gym  the task's own scorer, 0 to 1                                   metadata.reasoning_gym
    agreement      share of the other proposals with the same short answer         two proposals or more
    length         characters of the text: a control, not a reward
    reward_model   logit of a sequence-classification reward model                 scores.reward_model
    none           always None, "no scorer"
    auto           the verifier of the row's `task`, `none` where it has none

The first three are verifiers: 1.0 means the answer is right, and `verify` says so for targets as well. A selection made
with them uses knowledge of the answer.

    scorer = build_scorer(ScoresConfig())
    scorer.score(row, ["- tea", "tea"])     ->  [Score(value=1.0, reason=None), Score(value=0.0, reason=None)]
    scorer.name_of(row)                     ->  "constraints"
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from aft_ray.config import ScoresConfig
from aft_ray.data.answers import final_number, short_answer
from aft_ray.data.constraints import check_all
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import metadata_of

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The reward of one proposal: a value, or the reason why there is none."""

    value: float | None
    reason: str | None = None


class Scorer(Protocol):
    """Scores the texts of one prompt, in order; one Score per text."""

    def name_of(self, row: Row) -> str:
        """Which scorer the row gets: what its `scorer` column says."""
        ...

    def score(self, row: Row, texts: Sequence[str]) -> list[Score]:
        """One Score per text. A text or row that cannot be scored gets a reason; only a wrong set-up raises."""
        ...


# ── one text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def score_constraints(row: Row, text: str) -> float:
    """Share of the row's constraints that `text` meets."""
    metadata = metadata_of(row)
    if "constraints" not in metadata:
        raise InputError("no constraints in the row's metadata")
    return check_all(metadata["constraints"], text)


def score_numeric(row: Row, text: str) -> float:
    """1.0 when the final number of `text` is the reference's final number; a text without a number is wrong: 0.0."""
    expected = final_number(row.get("reference") or "")
    if expected is None:
        raise InputError(f"no number in the reference {row.get('reference')!r}")
    return float(final_number(text) == expected)


def score_reasoning_gym(row: Row, text: str) -> float:
    """The task's own score of what stands in the last `<answer>` tag, or of the whole text."""
    recipe = metadata_of(row).get("reasoning_gym")
    if not recipe:
        raise InputError("no reasoning_gym item in the row's metadata")
    dataset = _reasoning_gym_dataset(recipe["name"], recipe["size"], recipe["seed"])
    entry = dataset[recipe["index"]]
    if entry["question"] != row["messages"][-1]["content"]:
        raise InputError("the installed reasoning_gym makes another question for this item; use the version of the run")
    answer = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return float(dataset.score_answer(answer, entry))


@lru_cache(maxsize=64)
def _reasoning_gym_dataset(name: str, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError("reasoning_gym is not installed; pip install aft-ray[tasks]") from None
    return reasoning_gym.create_dataset(name, size=size, seed=seed)


def score_length(row: Row, text: str) -> float:
    """Characters of the stripped text."""
    return float(len(text.strip()))


VERIFIERS: dict[str, Callable[[Row, str], float]] = {
    "constraints": score_constraints,
    "numeric": score_numeric,
    "reasoning_gym": score_reasoning_gym,
}
"""Task -> what checks its answers; 1.0 is right."""


def verify(row: Row, text: str) -> bool | None:
    """Whether the verifier of the row's task accepts `text`; None where there is no verifier or it could not tell."""
    verifier = VERIFIERS.get(row.get("task") or "")
    if verifier is None:
        return None
    value = PerText("verify", verifier).score(row, [text])[0].value
    return None if value is None else value >= 1.0


# ── all texts of a prompt ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PerText:
    """Scores every text by itself."""

    name: str
    score_text: Callable[[Row, str], float]

    def name_of(self, row: Row) -> str:
        return self.name

    def score(self, row: Row, texts: Sequence[str]) -> list[Score]:
        return [self._score(row, text) for text in texts]

    def _score(self, row: Row, text: str) -> Score:
        try:
            return Score(value=self.score_text(row, text))
        except ConfigError:  # a package is missing: so it is for every row
            raise
        except Exception as error:  # a scorer is foreign code on model output: one text may not end the stage
            logger.warning("scorer %s, prompt %s: %r", self.name, row.get("prompt_id"), error)
            return Score(value=None, reason=f"{type(error).__name__}: {error}")


class Agreement:
    """Share of the other proposals with the same short answer (self-consistency, arXiv 2203.11171).

    Task `numeric` compares final numbers, other tasks `answers.short_answer`.
    """

    def name_of(self, row: Row) -> str:
        return "agreement"

    def score(self, row: Row, texts: Sequence[str]) -> list[Score]:
        if len(texts) < 2:
            return [Score(value=None, reason="agreement needs two proposals or more")] * len(texts)
        extract: Callable[[str], Any] = final_number if row.get("task") == "numeric" else short_answer
        answers = [extract(text) for text in texts]
        return [self._score(answer, answers) for answer in answers]

    @staticmethod
    def _score(answer: Any, answers: Sequence[Any]) -> Score:
        if answer is None:
            return Score(value=None, reason="no short answer in the text")
        return Score(value=(answers.count(answer) - 1) / (len(answers) - 1))


class NoScorer:
    """Leaves every proposal without a score."""

    def name_of(self, row: Row) -> str:
        return "none"

    def score(self, row: Row, texts: Sequence[str]) -> list[Score]:
        return [Score(value=None, reason="no scorer")] * len(texts)


class AutoScorer:
    """The verifier of each row's task."""

    def name_of(self, row: Row) -> str:
        task = row.get("task") or ""
        return task if task in VERIFIERS else "none"

    def score(self, row: Row, texts: Sequence[str]) -> list[Score]:
        name = self.name_of(row)
        scorer: Scorer = PerText(name, VERIFIERS[name]) if name in VERIFIERS else NoScorer()
        return scorer.score(row, texts)


def build_scorer(config: ScoresConfig) -> Scorer:
    """The scorer that the config names. Loads (and tries) the reward model; everything else costs nothing.

    Raises ConfigError for a reward model that is missing, is none, or fails its start-up check.
    """
    if config.scorer == "auto":
        return AutoScorer()
    if config.scorer == "agreement":
        return Agreement()
    if config.scorer == "length":
        return PerText("length", score_length)
    if config.scorer == "none":
        return NoScorer()
    if config.scorer == "reward_model":
        return _reward_model(config)
    return PerText(config.scorer, VERIFIERS[config.scorer])


def _reward_model(config: ScoresConfig) -> Scorer:
    from aft_ray.data.reward_model import RewardModel

    if config.reward_model is None:
        raise ConfigError(
            "scores.scorer is reward_model but scores.reward_model is not set: give the hub id or folder of a "
            "sequence-classification reward model, or choose another scorer"
        )
    return RewardModel(config.reward_model, num_threads=max(1, int(config.placement.num_cpus)))
