"""Decides which targets are left out of the training set. The reason is written on the row and counted.

reason                          setting (targets.filters)
empty target                    always
reasoning without an answer     always
truncated target                finish_reasons
finish reason <reason>          finish_reasons
rejected by the verifier        rejected
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

_CANNOT = (
    r"(?:cannot|can't|can not|won't|will not|(?:am|are|'m|'re) (?:not able to|unable to|not comfortable)|must decline)"
)
_HELPING = (
    r"(?:help(?! but)|assist|provide|answer|fulfill?|comply|do (?:that|this|so)|discuss|create|write|generate|produce"
    r"|give|offer|share|engage|support|participate|respond|continue|complete|fulfil|disclose|advise|talk about)"
)
_SORRY = (
    r"(?:(?:i'm |i am |we're |we are )?(?:so |very |truly |really |deeply |terribly )?(?:sorry|afraid)"
    r"|i apologi[sz]e|my apologies|unfortunately|no)"
)
_DECLINES = re.compile(
    rf"^\W*{_SORRY}?\W*(?:but |as an ai[^.,]*,? ?|for [^.,]*, )*(?:i|we)(?: |(?='))(?:really |simply )?{_CANNOT}"
    rf"(?:\W*$|\W*[.!](?:\s|$)|[^.!?]{{0,40}}?\b{_HELPING}\b)",
    re.IGNORECASE,
)
"""Matches a text whose first sentence declines to help."""
_GOES_ON = re.compile(r"\b(?:but|however|instead|though|that said|still)\b", re.IGNORECASE)
_OFFERS = re.compile(
    r"\b(?:i can|i could|i'd|i would|i'm happy|i am happy|happy to|glad to|let me know|feel free|if you|please|anything"
    r" else|is there)\b",
    re.IGNORECASE,
)
_ANSWER_WORDS = 8
"""Words after `but` that make an answer of a sentence that began by declining, unless they offer something else."""


def is_refusal(text: str) -> bool:
    """Return whether the text declines to answer: its first sentence does, and no answer follows. English only.

    >>> is_refusal("I'm sorry, but I can't help with that."), is_refusal("You cannot divide by zero.")
    (True, False)
    >>> is_refusal("I can't provide an exact figure, but about 40 million people live there, most of them in cities.")
    False
    """
    text = text.replace("’", "'").strip()
    declined = _DECLINES.match(text)
    if declined is None:
        return False
    goes_on = _GOES_ON.search(text, declined.end())
    if goes_on is None:
        return True
    rest = text[goes_on.end() :]
    return len(rest.split()) < _ANSWER_WORDS or bool(_OFFERS.search(rest))


def why_left_out(
    target: Target, proposals: Sequence[str], scores: Sequence[float | None], filters: TargetFilters
) -> str | None:
    """Return the first reason to leave out `target`, or None. It was written from `proposals`, which have `scores`."""
    if not target.text.strip():
        return "reasoning without an answer" if target.reasoning else "empty target"
    if target.finish_reason not in filters.finish_reasons:
        return "truncated target" if target.finish_reason == "length" else f"finish reason {target.finish_reason}"
    if filters.rejected and target.verified is False:
        return "rejected by the verifier"
    if filters.refused and is_refusal(target.text):
        return "refused target"
    most = filters.max_similarity
    if most is not None and any(similarity(target.text, text) >= most for text in proposals):
        return "copies a proposal"
    best = max((score for score in scores if score is not None), default=None)
    if filters.worse_than_best and best is not None and target.score is not None and target.score < best:
        return "worse than the best proposal"
    return None
