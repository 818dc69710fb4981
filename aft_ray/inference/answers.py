"""The short answer within a longer text: its final number, or the few words that state the answer.

final_number("5 + 7 = 12, so she pays $1,200.50.")   -> Decimal("1200.50")
final_number("He has 40 left.\\n#### 42")             -> Decimal("42")     the GSM8K form
short_answer("I think so. The answer is Paris.")     -> "paris"
"""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(
    r"(?<!\w)(?<!\d\.)(-?)\$?(-?)"  # a sign before or after the dollar; after a digit it is a minus, not a sign (10-5)
    r"(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE]([+-]?\d{1,3})\b)?"
)
MARKED = re.compile(
    r"####\s*(?P<hash>[^\n]+)|\\boxed\{(?P<box>[^{}]+)\}|<answer>(?P<tag>(?:(?!<answer>).)*?)</answer>"
    r"|\banswer\s*+(?:is|:)\s*+(?P<said>\S+?(?:[^\S\n]++\S+?)*?"
    r"(?=[^\S\n]*+(?:[.!?]\s|[.!?]?[^\S\n]*+(?:\n|\Z)))|(?<=\s)\Z)",
    re.IGNORECASE | re.DOTALL,
)
"""Matches a marked answer, in time linear in the text: a model may write thousands of spaces or opening tags in a row,
so no run of white space is scanned again from its middle, and no `<answer>` beyond the next one."""
MAX_WORDS = 10
"""A text without a marked answer is its own short answer if it has at most this many words."""


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, else the last number; None where the text has no number.

    Thousands commas, dollar signs, decimals, signs and exponents are understood; a fraction counts as two numbers.
    """
    text = text.replace("−", "-")
    _, mark, after = text.rpartition("####")
    first = NUMBER.search(after) if mark else None
    if first:
        return _decimal(first)
    numbers = list(NUMBER.finditer(text))
    return _decimal(numbers[-1]) if numbers else None


def short_answer(text: str) -> str | None:
    """Return the short answer of `text`, normalised so that equal answers are equal strings; None where there is none.

    It is the last marked answer (`####`, `\\boxed{}`, `<answer>`, "the answer is"), else the whole text if it is short.
    """
    marked = [next(part for part in found.groups() if part is not None) for found in MARKED.finditer(text)]
    answer = marked[-1] if marked else text
    if not marked and len(text.split()) > MAX_WORDS:
        return None
    return normalised(answer) or None


def normalised(answer: str) -> str:
    """Return an answer in lower case, without punctuation and articles; a lone number in its plainest form."""
    answer = answer.strip().strip(".!?:;\"'*` ")
    number = NUMBER.fullmatch(answer.replace("−", "-"))
    if number:
        return f"{_decimal(number).normalize():f}"
    words = re.findall(r"[\w.+\-/]+", answer.casefold())
    # a lone "A" is a choice, not an article
    return " ".join([word for word in words if word not in {"a", "an", "the"}] or words)


def _decimal(found: re.Match[str]) -> Decimal:
    sign, inner_sign, digits, exponent = found.groups()
    return Decimal(f"{sign or inner_sign}{digits.replace(',', '')}{'E' + exponent if exponent else ''}")
