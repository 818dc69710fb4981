"""Chooses the scorer that a config names. A scorer gives each proposal a number, or None and the reason.

    scorer         the number is                                                  and the config or row needs
    <verifier>     `constraints`, `numeric`, `reasoning_gym`, `ifeval`: see `verifiers`
    auto           that of the verifier of the row's `task`; no score if there is none
    agreement      the share of the other proposals with the same short answer    two proposals or more
    length         the number of characters (a control, not a reward)
    reward_model   the logit of a sequence-classification reward model            scores.reward_model
    judge          the share of pairwise comparisons won before an LLM judge      scores.judge
    likelihood     the log-probability under a model                              scores.likelihood
    none           always None, "no scorer"

A selection that is made with a verifier uses knowledge of the correct answer.

    scorer = build_scorer(ScoresConfig())
    await scorer.score(row, ["- tea", "tea"])     ->  Scored(scores=[Score(value=1.0), Score(value=0.0)])
    scorer.name_of(row)                           ->  "constraints"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aft_ray.config import Config, EngineConfig, ScoresConfig
from aft_ray.data.judge import PROMPT_HASH, Judge
from aft_ray.data.likelihood import Likelihood
from aft_ray.data.reward_model import RewardModel
from aft_ray.data.scoring import Row, Score, Scored, Scorer
from aft_ray.data.verifiers import VERIFIERS, score_text
from aft_ray.errors import ConfigError
from aft_ray.inference.answers import final_number, short_answer
from aft_ray.templates import InContextPrompt


@dataclass(frozen=True)
class PerText(Scorer):
    """Scores each text on its own with a function."""

    name: str
    function: Callable[[Row, str], float]

    def name_of(self, row: Row) -> str:
        return self.name

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        return Scored(scores=[score_text(self.name, self.function, row, text) for text in texts])


class Agreement(Scorer):
    """Scores the share of the other proposals with the same short answer (self-consistency, arXiv 2203.11171).

    Task `numeric` compares final numbers; other tasks compare `answers.short_answer`.
    """

    def name_of(self, row: Row) -> str:
        return "agreement"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        if len(texts) < 2:
            return Scored(scores=[Score(value=None, reason="agreement needs two proposals or more")] * len(texts))
        extract: Callable[[str], Any] = final_number if row.get("task") == "numeric" else short_answer
        answers = [extract(text) for text in texts]
        return Scored(scores=[self._score(answer, answers) for answer in answers])

    @staticmethod
    def _score(answer: Any, answers: Sequence[Any]) -> Score:
        if answer is None:
            return Score(value=None, reason="no short answer in the text")
        return Score(value=(answers.count(answer) - 1) / (len(answers) - 1))


class NoScorer(Scorer):
    """Leaves every proposal without a score."""

    def name_of(self, row: Row) -> str:
        return "none"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        return Scored(scores=[Score(value=None, reason="no scorer")] * len(texts))


class AutoScorer(Scorer):
    """Scores each row with the verifier of its task."""

    def name_of(self, row: Row) -> str:
        return self._scorer(row).name_of(row)

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        return await self._scorer(row).score(row, texts)

    @staticmethod
    def _scorer(row: Row) -> Scorer:
        task = row.get("task") or ""
        return PerText(task, VERIFIERS[task]) if task in VERIFIERS else NoScorer()


def score_length(row: Row, text: str) -> float:
    """Return the number of characters of the stripped text."""
    return float(len(text.strip()))


def build_scorer(
    config: ScoresConfig, engine: EngineConfig | None = None, *, seed: int = 0, in_context: str = "default"
) -> Scorer:
    """Build the scorer that the config names, and load its model if it has one.

    `engine` is the run's engine, for a `likelihood` without its own; `seed` draws the judge's pairs; `in_context` names
    the in-context prompt for base models. Raises ConfigError if the model is missing, is of the wrong kind, or fails
    its check.
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
            assert config.reward_model is not None  # ScoresConfig checks it
            return RewardModel(config.reward_model, num_threads=max(1, int(config.placement.num_cpus)))
        case "judge":
            assert config.judge is not None  # ScoresConfig checks it
            return Judge(config.judge, seed)
        case "likelihood":
            engine = config.likelihood.engine or engine
            if engine is None:
                raise ConfigError("scores.scorer is likelihood: set scores.likelihood.engine to the model's engine")
            return Likelihood(config.likelihood, engine, in_context)
        case verifier:
            return PerText(verifier, VERIFIERS[verifier])


def text_scorer_config(config: ScoresConfig) -> ScoresConfig:
    """Return the config of a scorer for single texts, such as evaluated answers: `auto` replaces judge and likelihood.

    A judge compares the proposals of one prompt, and a likelihood does not measure quality across systems.
    """
    return config.model_copy(update={"scorer": "auto"}) if config.scorer in {"judge", "likelihood"} else config


def scorer_settings(config: Config) -> dict[str, Any]:
    """Return everything that determines the scores, for fingerprints; the run's seed and model only where they do."""
    without_engines: Any = {"placement": True, "judge": {"engine"}, "likelihood": {"engine"}}
    settings: dict[str, Any] = {"scores": config.scores.model_dump(mode="json", exclude=without_engines)}
    if config.scores.scorer == "judge" and config.scores.judge is not None:
        settings |= {"seed": config.run.seed, "judge_prompt": PROMPT_HASH}
        settings["engine"] = config.scores.judge.engine.identity()
    if config.scores.scorer == "likelihood":
        settings["engine"] = (config.scores.likelihood.engine or config.engine).identity()
        settings["in_context"] = InContextPrompt.load(config.templates.in_context).hash
    return settings
