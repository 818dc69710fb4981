"""Scorers: a number for each proposal of a prompt, or None with the reason. Nothing is ever made up.

    scorer         what the number is                                              needs
    constraints    share of the prompt's constraints that are met, 0 to 1          metadata.constraints
    numeric        1 when the final number equals the reference's, else 0          reference
    reasoning_gym  the task's own scorer, 0 to 1                                   metadata.reasoning_gym
    ifeval         share of the prompt's IFEval instructions that are followed     metadata.instruction_id_list, kwargs
    agreement      share of the other proposals with the same short answer         two proposals or more
    length         characters of the text: a control, not a reward
    reward_model   logit of a sequence-classification reward model                 scores.reward_model
    judge          share of pairwise comparisons won before an LLM judge, 0 to 1   scores.judge
    likelihood     log-probability under a model                                   scores.likelihood
    none           always None, "no scorer"
    auto           the verifier of the row's `task`, `none` where it has none

The first four are verifiers: 1.0 means the answer is right, and `verify` says so for targets as well. A selection made
with them uses knowledge of the answer.

    scorer = build_scorer(ScoresConfig())
    await scorer.score(row, ["- tea", "tea"])     ->  [Score(value=1.0, reason=None), Score(value=0.0, reason=None)]
    scorer.name_of(row)                           ->  "constraints"
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from aft_ray.config import EngineConfig, ScoresConfig
from aft_ray.data.constraints import check_all
from aft_ray.errors import ConfigError, InputError
from aft_ray.inference.answers import final_number, short_answer
from aft_ray.records import metadata_of

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """The reward of one proposal: a value, or the reason why there is none."""

    value: float | None
    reason: str | None = None


class Scores(list[Score]):
    """One Score per text, in order, and the tokens of a model that were spent on them."""

    def __init__(
        self, scores: Iterable[Score], *, prompt_tokens: int = 0, completion_tokens: int = 0, cost_usd: float = 0.0
    ) -> None:
        super().__init__(scores)
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.cost_usd = cost_usd


class Scorer(Protocol):
    """Scores the texts of one prompt, in order; one Score per text."""

    def name_of(self, row: Row) -> str:
        """Which scorer the row gets: what its `scorer` column says."""
        ...

    async def score(self, row: Row, texts: Sequence[str]) -> Scores:
        """One Score per text. A text or row that cannot be scored gets a reason.

        Raises ConfigError for a wrong set-up, and EngineError when the model behind the scorer gave no answer at all:
        then nothing was learnt of the row, and it should be tried again.
        """
        ...

    async def check(self) -> None:
        """Raise when the scorer itself is broken (its engine died)."""
        return None


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


def score_ifeval(row: Row, text: str) -> float:
    """Share of the row's IFEval instructions followed by `text` as it stands ("strict"): 1.0 is prompt-level strict.

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
    except LookupError as error:  # nltk's page of text on a missing data file
        raise InputError(f"nltk data is missing: {' '.join(str(error).replace('*', '').split())[:200]}") from None
    return sum(followed) / len(followed)


@lru_cache(maxsize=1)
def _ifeval_checkers() -> Any:
    try:
        import langdetect
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise ConfigError(f"the IFEval checkers are not installed ({error}); pip install aft-ray[ifeval]") from None
    langdetect.DetectorFactory.seed = 0  # else the language of a short text is a matter of luck
    return utils


def score_length(row: Row, text: str) -> float:
    """Characters of the stripped text."""
    return float(len(text.strip()))


VERIFIERS: dict[str, Callable[[Row, str], float]] = {
    "constraints": score_constraints,
    "numeric": score_numeric,
    "reasoning_gym": score_reasoning_gym,
    "ifeval": score_ifeval,
}
"""Task -> what checks its answers; 1.0 is right."""


def verify(row: Row, text: str) -> bool | None:
    """Whether the verifier of the row's task accepts `text`; None where there is no verifier or it could not tell."""
    verifier = VERIFIERS.get(row.get("task") or "")
    if verifier is None:
        return None
    value = _score_text("verify", verifier, row, text).value
    return None if value is None else value >= 1.0


def _score_text(name: str, score_text: Callable[[Row, str], float], row: Row, text: str) -> Score:
    try:
        return Score(value=score_text(row, text))
    except ConfigError:  # a package is missing: so it is for every row
        raise
    except Exception as error:  # a scorer is foreign code on model output: one text may not end the stage
        logger.warning("scorer %s, prompt %s: %r", name, row.get("prompt_id"), error)
        return Score(value=None, reason=f"{type(error).__name__}: {error}")


# ── all texts of a prompt ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PerText(Scorer):
    """Scores every text by itself."""

    name: str
    score_text: Callable[[Row, str], float]

    def name_of(self, row: Row) -> str:
        return self.name

    async def score(self, row: Row, texts: Sequence[str]) -> Scores:
        return Scores(_score_text(self.name, self.score_text, row, text) for text in texts)


class Agreement(Scorer):
    """Share of the other proposals with the same short answer (self-consistency, arXiv 2203.11171).

    Task `numeric` compares final numbers, other tasks `answers.short_answer`.
    """

    def name_of(self, row: Row) -> str:
        return "agreement"

    async def score(self, row: Row, texts: Sequence[str]) -> Scores:
        if len(texts) < 2:
            return Scores([Score(value=None, reason="agreement needs two proposals or more")] * len(texts))
        extract: Callable[[str], Any] = final_number if row.get("task") == "numeric" else short_answer
        answers = [extract(text) for text in texts]
        return Scores(self._score(answer, answers) for answer in answers)

    @staticmethod
    def _score(answer: Any, answers: Sequence[Any]) -> Score:
        if answer is None:
            return Score(value=None, reason="no short answer in the text")
        return Score(value=(answers.count(answer) - 1) / (len(answers) - 1))


class NoScorer(Scorer):
    """Leaves every proposal without a score."""

    def name_of(self, row: Row) -> str:
        return "none"

    async def score(self, row: Row, texts: Sequence[str]) -> Scores:
        return Scores([Score(value=None, reason="no scorer")] * len(texts))


class AutoScorer(Scorer):
    """The verifier of each row's task."""

    def name_of(self, row: Row) -> str:
        task = row.get("task") or ""
        return task if task in VERIFIERS else "none"

    async def score(self, row: Row, texts: Sequence[str]) -> Scores:
        name = self.name_of(row)
        scorer: Scorer = PerText(name, VERIFIERS[name]) if name in VERIFIERS else NoScorer()
        return await scorer.score(row, texts)


def build_scorer(
    config: ScoresConfig, engine: EngineConfig | None = None, *, seed: int = 0, in_context: str = "default"
) -> Scorer:
    """The scorer that the config names. Loads its model (and tries a reward model); verifiers cost nothing.

    `engine` is the run's, for `likelihood` without one of its own; `seed` draws the judge's pairs; `in_context` is how
    a base model is asked. Raises ConfigError for a model that is missing, is of the wrong kind, or fails its check.
    """
    match config.scorer:
        case "auto":
            return AutoScorer()
        case "agreement":
            return Agreement()
        case "length":
            return PerText("length", score_length)
        case "none":
            return NoScorer()
        case "reward_model":
            return _reward_model(config)
        case "judge":
            return _judge(config, seed)
        case "likelihood":
            return _likelihood(config, engine, in_context)
        case verifier:
            return PerText(verifier, VERIFIERS[verifier])


def text_scorer_config(config: ScoresConfig) -> ScoresConfig:
    """What scores texts that stand alone (evaluated answers): the same, but `auto` for `judge` and `likelihood`.

    A judge compares the proposals of one prompt, and a likelihood is no measure of quality between systems.
    """
    return config.model_copy(update={"scorer": "auto"}) if config.scorer in {"judge", "likelihood"} else config


def _judge(config: ScoresConfig, seed: int) -> Scorer:
    from aft_ray.data.judge import Judge

    if config.judge is None:
        raise ConfigError("scores.scorer is judge: name the judge's engine in scores.judge.engine")
    return Judge(config.judge, seed)


def _likelihood(config: ScoresConfig, engine: EngineConfig | None, in_context: str) -> Scorer:
    from aft_ray.data.likelihood import Likelihood

    engine = config.likelihood.engine or engine
    if engine is None:
        raise ConfigError("scores.scorer is likelihood: name the model's engine in scores.likelihood.engine")
    return Likelihood(config.likelihood, engine, in_context)


def _reward_model(config: ScoresConfig) -> Scorer:
    from aft_ray.data.reward_model import RewardModel

    if config.reward_model is None:
        raise ConfigError(
            "scores.scorer is reward_model but scores.reward_model is not set: give the hub id or folder of a "
            "sequence-classification reward model, or choose another scorer"
        )
    return RewardModel(config.reward_model, num_threads=max(1, int(config.placement.num_cpus)))
