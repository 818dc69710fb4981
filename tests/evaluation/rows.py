"""Small answered prompts, written by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aft_ray.inference.events import LayerUsage
from aft_ray.records import PROMPTS


def usage(layer: int, num_answers: int, tokens: int, **changes: Any) -> dict[str, Any]:
    """One layer's usage: 10 prompt tokens per answer, half of them cached."""
    return dataclasses.asdict(
        LayerUsage(
            layer=layer,
            prompt_tokens=10 * num_answers,
            completion_tokens=tokens,
            cached_tokens=5 * num_answers,
            num_answers=num_answers,
            seconds=1.0,
            **changes,
        )
    )


def draft(index: int, text: str, error: str | None = None) -> dict[str, Any]:
    """A draft whose number of tokens is its number of words."""
    return {
        "index": index,
        "text": text,
        "finish_reason": "error" if error else "stop",
        "num_tokens": len(text.split()),
        "error": error,
        "inputs": [],
        "length_action": None,
        "reasoning": "",
        "score": None if error else score_of(text),
        "score_error": error,
    }


def answered(prompt_id: str, drafts: Sequence[str], answer: str, **changes: Any) -> dict[str, Any]:
    """A row of SCORED_ANSWERS at L=1, or at L=0 when there are no drafts."""
    words = len(answer.split())
    num_draft_tokens = sum(len(text.split()) for text in drafts)
    final = usage(1 if drafts else 0, 1, words)
    row = {
        **dict.fromkeys(PROMPTS.names),
        "prompt_id": prompt_id,
        "system": "aft",
        "messages": [{"role": "user", "content": f"question {prompt_id}"}],
        "task": "letters",
        "layers": [[draft(index, text) for index, text in enumerate(drafts)]] if drafts else [[draft(0, answer)]],
        "answer": answer,
        "finish_reason": "stop",
        "usage": [usage(0, len(drafts), num_draft_tokens), final] if drafts else [final],
        "seconds": 2.0,
        "answer_score": score_of(answer),
        "answer_score_error": None,
        "scorer": "numeric",
    }
    return {**row, **changes}


def score_of(text: str) -> float | None:
    """`right` 1, `half` 0.5, `wrong` 0, anything else cannot be scored."""
    return {"right": 1.0, "half": 0.5, "wrong": 0.0}.get(text.partition(" ")[0])
