"""Why a target should not be learned from. The reason is written on its row; the training set leaves it out, counted.

reason                          setting (targets.filters)
empty target                    always
truncated target                truncated
refused target                  refused
copies a proposal               max_copy
worse than the best proposal    worse_than_best
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from aft_ray.config import TargetFilters
from aft_ray.records import Target

REFUSAL = re.compile(
    r"^\W*(?:i(?:'|’)?m sorry|i am sorry|sorry|i apologi[sz]e|unfortunately)?\W*(?:but )?(?:as an ai[^.]*?,? ?)?"
    r"i(?:'m| am|’m)? (?:can(?:no|'|’)t|can not|won(?:'|’)t|will not|(?:am )?(?:not able|unable) to|must decline)\b"
    r"[^.]{0,60}\b(?:help|assist|provide|answer|fulfil+|comply|do that|with (?:that|this)|create|write|generate)\b",
    re.IGNORECASE,
)
"""An answer that begins by declining. English only: a refusal in another language passes."""


def is_refusal(text: str) -> bool:
    """Whether the answer begins by declining to answer.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("You cannot divide by zero.")
    (True, False)
    """
    return bool(REFUSAL.search(text[:300]))


def copy_similarity(text: str, proposals: Sequence[str], at_least: float = 0.0) -> float:
    """Similarity of `text` to the proposal it is most like: 2 x matching words / words of both, in order; 1 is a copy.

    Proposals that cannot reach `at_least` are not compared in full and count as 0.
    """
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(text.split())
    best = 0.0
    for proposal in proposals:
        matcher.set_seq1(proposal.split())
        if matcher.real_quick_ratio() >= at_least and matcher.quick_ratio() >= at_least:
            best = max(best, matcher.ratio())
    return best


def why_left_out(
    target: Target, proposals: Sequence[str], scores: Sequence[float | None], filters: TargetFilters
) -> str | None:
    """The first reason not to learn from `target`, or None. `proposals`, `scores`: those it was written from."""
    if not target.text.strip():
        return "empty target"
    if filters.truncated and target.finish_reason == "length":
        return "truncated target"
    if filters.refused and is_refusal(target.text):
        return "refused target"
    if filters.max_copy is not None and copy_similarity(target.text, proposals, filters.max_copy) >= filters.max_copy:
        return "copies a proposal"
    best = max((score for score in scores if score is not None), default=None)
    if filters.worse_than_best and best is not None and target.score is not None and target.score < best:
        return "worse than the best proposal"
    return None
