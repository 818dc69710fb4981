"""Drafts and answers side by side for a reader: the prompt, each draft, and the answer that was written from them.

    examples = choose_examples("aft", rows, checks, num_examples=3)

Which prompts are shown is decided by a hash of the prompt id, before anyone has looked at an answer: the examples are
a small sample, not a choice of the best ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aft_ray.records import Message, fingerprint


@dataclass(frozen=True, kw_only=True)
class Check:
    """One constraint that an answer was asked to meet."""

    name: str
    """In words, such as `exactly 3 bullets`."""
    met: bool | None
    """None when it could not be checked."""


Checks = Callable[[Mapping[str, Any], str], Sequence[Check]]
"""checks(row, text): what the row's prompt asked for, and whether `text` does it."""


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """One draft, aggregation or final answer."""

    text: str
    score: float | None
    checks: tuple[Check, ...] = ()
    finish_reason: str | None = None
    num_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """One held-out prompt as one system answered it."""

    system: str
    prompt_id: str
    messages: tuple[Message, ...]
    reference: str | None
    layers: tuple[tuple[ShownAnswer, ...], ...]
    """All layers below the final answer, the drafts first; empty at L=0."""
    answer: ShownAnswer


def choose_examples(
    system: str,
    rows: Sequence[Mapping[str, Any]],
    checks: Checks | None = None,
    *,
    num_examples: int = 3,
    seed: int = 0,
) -> list[Example]:
    """Choose `num_examples` rows of `SCORED_ANSWERS`: the same prompts for every system that answered them."""
    order = sorted(rows, key=lambda row: fingerprint([seed, row["prompt_id"]]))
    return [_example_of(system, row, checks) for row in order[:num_examples]]


def _example_of(system: str, row: Mapping[str, Any], checks: Checks | None) -> Example:
    def shown(answer: Mapping[str, Any]) -> ShownAnswer:
        failed = answer.get("error") is not None
        return ShownAnswer(
            text=answer["text"],
            score=answer["score"],
            checks=() if failed or checks is None else tuple(checks(row, answer["text"])),
            finish_reason=answer.get("finish_reason"),
            num_tokens=answer.get("num_tokens"),
            error=answer.get("error"),
        )

    num_layers = len(row["usage"]) - 1
    return Example(
        system=system,
        prompt_id=row["prompt_id"],
        messages=tuple(Message(role=turn["role"], content=turn["content"]) for turn in row["messages"]),
        reference=row["reference"],
        layers=tuple(tuple(shown(answer) for answer in layer) for layer in row["layers"][:num_layers]),
        answer=shown(
            {
                "text": row["answer"],
                "score": row["answer_score"],
                "finish_reason": row["finish_reason"],
                "num_tokens": row["usage"][-1]["completion_tokens"],
            }
        ),
    )
