"""Decides which targets are left out of the training set. The reason is written on the row and counted.

reason                          setting (targets.filters)
empty target                    always
truncated target                truncated
refused target                  refused
copies a proposal               max_similarity
worse than the best proposal    worse_than_best
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from aft_ray.config import TargetFilters
from aft_ray.data.similarity import similarity
from aft_ray.records import Target

REFUSAL = re.compile(
    r"^\W*(?:i(?:'|’)?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately)?\W*(?:but )?(?:as an ai[^.]*?,? ?)?"
    r"i(?:'m| am|’m)? (?:can(?:no|'|’)t|can not|won(?:'|’)t|will not|(?:am )?(?:not able|unable) to|must decline)\b"
    r"[^.]{0,60}\b(?:help|assist|provide|answer|fulfil+|comply|do that|with (?:that|this)|create|write|generate)\b",
    re.IGNORECASE,
)
"""Matches an answer that begins by declining. It knows English only; refusals in other languages pass."""


def is_refusal(text: str) -> bool:
    """Return whether the answer begins by declining to answer.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("You cannot divide by zero.")
    (True, False)
    """
    return bool(REFUSAL.search(text[:300]))


def why_left_out(
    target: Target, proposals: Sequence[str], scores: Sequence[float | None], filters: TargetFilters
) -> str | None:
    """Return the first reason to leave out `target`, or None. It was written from `proposals`, which have `scores`."""
    if not target.text.strip():
        return "empty target"
    if filters.truncated and target.finish_reason == "length":
        return "truncated target"
    if filters.refused and is_refusal(target.text):
        return "refused target"
    most = filters.max_similarity
    if most is not None and any(similarity(target.text, text) >= most for text in proposals):
        return "copies a proposal"
    best = max((score for score in scores if score is not None), default=None)
    if filters.worse_than_best and best is not None and target.score is not None and target.score < best:
        return "worse than the best proposal"
    return None
