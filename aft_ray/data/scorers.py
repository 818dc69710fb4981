"""Chooses the scorer that a config names. A scorer gives each proposal a number, or None and the reason.

    scorer         the number is                                                  and the config or row needs
    <verifier>     `constraints`, `numeric`, `math`, ...: see `verifiers`
    auto           that of `scores.verifier`, else of the row's `task`; no score without
    agreement      the share of the other proposals with the same short answer    two proposals or more
    source         the score that came with the answer (`prompts.responses`)      proposals from the source
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

from aft_ray.config import Config, EngineConfig, ScoresConfig, gpus_of
from aft_ray.data.judge import PROMPT_HASH, Judge
from aft_ray.data.likelihood import Likelihood
from aft_ray.data.reward_model import RewardModel, VllmRewardModel
from aft_ray.data.scoring import Row, Score, Scored, Scorer
from aft_ray.data.verifiers import VERIFIERS, off_loop, score_text, verifier_of, verifier_settings
from aft_ray.errors import ConfigError
from aft_ray.inference.answers import final_number, short_answer
from aft_ray.models import engine_identity, identity
from aft_ray.templates import InContextPrompt


@dataclass(frozen=True)
class PerText(Scorer):
    """Scores each text on its own with a function."""

    name: str
    function: Callable[[Row, str], float]

    def name_of(self, row: Row) -> str:
        return self.name

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        return Scored(scores=[await off_loop(score_text, self.name, self.function, row, text) for text in texts])


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


class SourceScores(Scorer):
    """Scores an answer that came with the prompt by the score that came with it."""

    def name_of(self, row: Row) -> str:
        return "source"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        known = {response["text"].strip(): response["score"] for response in row.get("responses") or ()}
        return Scored(scores=[self._score(known.get(text.strip())) for text in texts])

    @staticmethod
    def _score(value: float | None) -> Score:
        return Score(value=value, reason=None if value is not None else "the source has no score for this answer")


class NoScorer(Scorer):
    """Leaves every proposal without a score."""

    def name_of(self, row: Row) -> str:
        return "none"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        return Scored(scores=[Score(value=None, reason="no scorer")] * len(texts))


@dataclass(frozen=True)
class AutoScorer(Scorer):
    """Scores each row with one verifier, or with that of its task."""

    verifier: str | None = None

    def name_of(self, row: Row) -> str:
        return self._scorer(row).name_of(row)

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        return await self._scorer(row).score(row, texts)

    def _scorer(self, row: Row) -> Scorer:
        found = verifier_of(row, self.verifier)
        return PerText(*found) if found else NoScorer()


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
            return AutoScorer(config.verifier)
        case "agreement":
            return Agreement()
        case "length":
            return PerText("length", score_length)
        case "source":
            return SourceScores()
        case "none":
            return NoScorer()
        case "reward_model":
            assert config.reward_model is not None  # ScoresConfig checks it
            if config.reward_engine == "vllm":
                return VllmRewardModel(config.reward_model, int(config.placement.num_gpus or 1))
            num_threads = max(1, int(config.placement.num_cpus))
            return RewardModel(config.reward_model, config.batch_tokens, num_threads)
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


def gpus_of_scorer(config: Config) -> int:
    """Return the number of GPUs that the scorer's model uses where there are GPUs."""
    scores = config.scores
    match scores.scorer:
        case "reward_model":
            return 1
        case "judge":
            return gpus_of(scores.judge.engine) if scores.judge is not None else 0
        case "likelihood":
            return gpus_of(scores.likelihood.engine or config.engine)
        case _:
            return 0


def is_light(config: ScoresConfig) -> bool:
    """Return whether the scorer needs no model and takes milliseconds. A user's own function may do anything."""
    return config.scorer not in {"reward_model", "judge", "likelihood"} and config.verifier is None


def answer_scorer_config(config: ScoresConfig) -> ScoresConfig:
    """Return the config of the scorer for answers of different systems: `auto` where the run's own cannot compare them.

    A judge and agreement compare the texts of one prompt with each other, a likelihood does not measure quality, and
    the source knows no new answers.
    """
    is_relative = config.scorer in {"judge", "agreement", "likelihood", "source"}
    return config.model_copy(update={"scorer": "auto"}) if is_relative else config


def candidate_scorer_config(config: ScoresConfig) -> ScoresConfig:
    """Return the config of the scorer for the candidates of one target: `auto` where the own one cannot judge them."""
    cannot = config.scorer in {"likelihood", "source"}
    return config.model_copy(update={"scorer": "auto"}) if cannot else config


def scorer_settings(config: Config) -> dict[str, Any]:
    """Return everything that determines the scores, for fingerprints; the run's seed and model only where they do."""
    by_content: Any = {
        "placement": True,
        "reward_model": True,
        "batch_tokens": True,
        "judge": {"engine"},
        "likelihood": {"engine", "adapter"},
        "verifier": True,
    }
    settings: dict[str, Any] = {"scores": config.scores.model_dump(mode="json", exclude=by_content)}
    settings |= verifier_settings(config.scores.verifier)
    if config.scores.scorer == "reward_model":
        settings["reward_model"] = identity(config.scores.reward_model)
    if config.scores.scorer == "judge" and config.scores.judge is not None:
        settings |= {"seed": config.run.seed, "judge_prompt": PROMPT_HASH}
        settings["engine"] = engine_identity(config.scores.judge.engine)
    if config.scores.scorer == "likelihood":
        settings["engine"] = engine_identity(config.scores.likelihood.engine or config.engine)
        settings["adapter"] = identity(config.scores.likelihood.adapter)
        settings["in_context"] = InContextPrompt.load(config.templates.in_context).hash
    return settings
