"""Defines scores and scorers. Scorer modules build on this one, and `scorers.build_scorer` chooses between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aft_ray.records import Spent

Row = Mapping[str, Any]
"""One row of the proposals stage: a prompt with its proposals."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The reward of one text: a value, or None and the reason why there is no value."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scored(Spent):
    """The scores of one prompt's texts, and the tokens that a model read and wrote to make them."""

    scores: Sequence[Score]
    """One score per text, in the order of the texts."""


class Scorer(ABC):
    """Scores the texts of one prompt."""

    @abstractmethod
    def name_of(self, row: Row) -> str:
        """Return the name written into the row's `scorer` column."""

    @abstractmethod
    async def score(self, row: Row, texts: Sequence[str]) -> Scored:
        """Score every text. A text or a row that cannot be scored gets a reason instead of a value.

        Raises ConfigError for a wrong setup, and EngineError if the model behind the scorer gave no answer at all:
        then nothing is known about the row, and it should be tried again.
        """

    async def check(self) -> None:  # noqa: B027 (most scorers have no engine that could die)
        """Raise if the scorer itself is broken, for example because its engine died."""

    async def close(self) -> None:  # noqa: B027
        """Free the model behind the scorer."""
