"""Verifier `exact`: the answer is the reference, up to letter case, articles, punctuation and Unicode spelling.

    score_exact({"reference": "The Café"}, "So the answer is: cafe\u0301.")        1.0
    score_exact({"reference": "New York"}, "It is New York, I believe.")           0.0    no answer of its own

What is compared is the stated answer, else the whole text. `aliases` in the metadata are further right answers.
"""

from __future__ import annotations

from aft_ray.data.scoring import Row
from aft_ray.errors import InputError
from aft_ray.inference.answers import normalised, stated_answer
from aft_ray.records import metadata_of


def score_exact(row: Row, text: str) -> float:
    """Return 1.0 if the stated answer, else the whole text, equals the reference or an alias after normalisation."""
    reference, aliases = row.get("reference"), metadata_of(row).get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise InputError(f"aliases: expected a list of texts, found {aliases!r}")
    right = {normalised(answer) for answer in [stated_answer(reference or "") or reference or "", *aliases]} - {""}
    if not right:
        raise InputError(f"nothing to compare with in the reference {reference!r}")
    stated = stated_answer(text)
    return float(normalised(text if stated is None else stated) in right)
