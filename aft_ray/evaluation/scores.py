"""evaluation/<system>/answers -> evaluation/<system>/scores: every draft and every answer gets a reward, or a reason.

in    ANSWERS
out   + score and score_error inside each answer of each layer; answer_score, answer_score_error; scorer
on    as the stage `scores`: CPU, or a GPU for a reward model
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import pyarrow as pa

from aft_ray.config import PlacementConfig
from aft_ray.evaluation.ask import ANSWER, ANSWERS
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage

SCORED_ANSWER = pa.struct([*ANSWER, ("score", pa.float64()), ("score_error", pa.string())])
SCORED_ANSWERS = pa.schema(
    [
        *(
            pa.field("layers", pa.list_(pa.list_(SCORED_ANSWER))) if field.name == "layers" else field
            for field in ANSWERS
        ),
        pa.field("answer_score", pa.float64()),
        pa.field("answer_score_error", pa.string()),
        pa.field("scorer", pa.string()),
    ]
)
"""`evaluation/<system>/scores/*.parquet`: one row per prompt. The report reads nothing else of a system."""


class TextScorer(Protocol):
    """What scores the answers: `data.scoring.Scorer` is one."""

    def name_of(self, row: Mapping[str, Any]) -> str: ...

    async def score(self, row: Mapping[str, Any], texts: Sequence[str]) -> Any:
        """Return an object whose `scores` hold a `value` or a `reason` for each text."""
        ...

    async def check(self) -> None: ...

    async def close(self) -> None: ...


class AnswerScoreWorker(RowWorker):
    """Scores the drafts and the final answer of a row; a text that occurs several times is scored once."""

    def __init__(self, scorer: Callable[[], TextScorer]) -> None:
        self.scorer = scorer()

    async def process(self, row: dict[str, Any]) -> Processed:
        answers = [answer for layer in row["layers"] for answer in layer]
        usable = [row["answer"], *(answer["text"] for answer in answers if not answer["error"])]
        texts = list(dict.fromkeys(text for text in usable if text))
        scored = await self.scorer.score(row, texts)
        scores = {text: (one.value, one.reason) for text, one in zip(texts, scored.scores, strict=True)}

        def score_of(text: str, error: str | None = None) -> tuple[float | None, str | None]:
            return (None, error) if error else scores.get(text, (None, "empty answer"))

        def with_score(answer: Mapping[str, Any]) -> dict[str, Any]:
            value, reason = score_of(answer["text"], answer["error"])
            return {**answer, "score": value, "score_error": reason}

        value, reason = score_of(row["answer"])
        made = {
            **row,
            "layers": [[with_score(answer) for answer in layer] for layer in row["layers"]],
            "answer_score": value,
            "answer_score_error": reason,
            "scorer": self.scorer.name_of(row),
        }
        return Processed(
            rows=[made],
            prompt_tokens=scored.prompt_tokens,
            completion_tokens=scored.completion_tokens,
            cost_usd=scored.cost_usd,
        )

    async def check(self) -> None:
        await self.scorer.check()

    async def close(self) -> None:
        await self.scorer.close()


def stage(
    run: Run,
    *,
    system: str,
    scorer: Callable[[], TextScorer],
    settings: Mapping[str, Any],
    placement: PlacementConfig,
    gpus: int,
    is_light: bool,
) -> Stage:
    """Return the stage that scores one system's answers.

    `settings` identify the scorer, `gpus` is the number that its model uses, and it is light where it has no model.
    """
    folder = run.folder.child("evaluation").child(system)
    return Stage(
        name=f"scores {system}",
        source=folder.child("answers"),
        output=folder.child("scores"),
        schema=SCORED_ANSWERS,
        settings=settings,
        worker=partial(AnswerScoreWorker, scorer),
        placement=placement,
        gpus=gpus,
        is_light=is_light,
    )
