"""Scores each proposal by its log-probability as the answer under a model.

The token ids are the ones that training would use for the same answer: prompt, answer, end of turn. `per_token` takes
the mean over the answer's tokens; their sum favours short answers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from aft_ray.config import EngineConfig, LikelihoodConfig
from aft_ray.data.scoring import Row, Score, Scored, Scorer
from aft_ray.engines import build_engine
from aft_ray.errors import ConfigError, InputError
from aft_ray.templates.chat import Style
from aft_ray.templates.loading import load_format


class Likelihood(Scorer):
    """Reads log-probabilities from an engine, which the constructor builds."""

    def __init__(self, config: LikelihoodConfig, engine: EngineConfig, in_context: str = "default") -> None:
        if engine.type == "openai":
            raise _takes_messages(engine.model)
        self.config = config
        self.engine = build_engine(engine, adapters=[config.adapter] if config.adapter else [])
        if self.engine.info.takes_messages:
            raise _takes_messages(self.engine.info.model)
        # with a template of its own, a model is asked about what it is trained to write
        style: Style = "auto" if self.engine.info.chat_template is None else "chat"
        self.format = load_format(self.engine.info, style, in_context)

    def name_of(self, row: Row) -> str:
        return "likelihood"

    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        found = await asyncio.gather(*(self._score(row, text) for text in texts))
        return Scored(scores=[score for score, _ in found], prompt_tokens=sum(num_tokens for _, num_tokens in found))

    async def _score(self, row: Row, text: str) -> tuple[Score, int]:
        """Return the score and the number of tokens the model read. Raises EngineError if the engine cannot answer."""
        if not text.strip():
            return Score(value=None, reason="empty answer"), 0
        try:
            prompt_ids = self.format.prompt_ids(row["messages"])
            target_ids = self.format.target_ids(row["messages"], text)
        except InputError as error:  # the chat template rejects this conversation
            return Score(value=None, reason=f"InputError: {error}"), 0
        num_tokens, window = len(prompt_ids) + len(target_ids), self.engine.info.max_model_len
        if num_tokens >= window:  # vLLM generates one token after the ones it reads
            reason = (
                f"{len(prompt_ids)} prompt + {len(target_ids)} answer tokens do not fit the context window of {window}"
            )
            return Score(value=None, reason=reason), 0
        log_probs = await self.engine.score(prompt_ids, target_ids, self.config.adapter)
        value = math.fsum(log_probs) / (len(log_probs) if self.config.per_token else 1)
        if not math.isfinite(value):
            return Score(value=None, reason=f"the log-probability is {value}"), num_tokens
        return Score(value=value), num_tokens

    async def check(self) -> None:
        await self.engine.check()

    async def close(self) -> None:
        await self.engine.close()


def _takes_messages(model: str) -> ConfigError:
    return ConfigError(
        f"scores.scorer is likelihood, but the engine of {model} takes messages, not token ids, and returns no "
        "log-probabilities of a given text: name a vllm or transformers engine in scores.likelihood.engine"
    )
