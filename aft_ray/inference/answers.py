"""The short answer inside a longer text: its final number, or the few words it comes down to.

final_number("5 + 7 = 12, so she pays $1,200.50.")   -> Decimal("1200.50")
final_number("He has 40 left.\\n#### 42")             -> Decimal("42")     the GSM8K form
short_answer("I think so. The answer is Paris.")     -> "paris"
"""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(
    r"(?<!\w)(?<!\d\.)(-?)\$?(-?)"  # a sign, on either side of the dollar; none after a digit (10-5)
    r"(\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE]([+-]?\d{1,3})\b)?"
)
MARKED = re.compile(
    r"####\s*(?P<hash>[^\n]+)|\\boxed\{(?P<box>[^{}]+)\}|<answer>(?P<tag>.*?)</answer>"
    r"|\banswer\s*(?:is|:)\s*(?P<said>[^\n]+?)(?=[.!?]?\s*(?:\n|$)|[.!?]\s)",
    re.IGNORECASE | re.DOTALL,
)
MAX_WORDS = 10
"""A text without a marked answer counts as its own short answer up to this many words."""


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, else the last number; None where there is none.

    Reads thousands commas, dollar signs, decimals, signs and exponents. Fractions are not read as one number.
    """
    text = text.replace("−", "-")
    _, mark, after = text.rpartition("####")
    first = NUMBER.search(after) if mark else None
    if first:
        return _decimal(first)
    numbers = list(NUMBER.finditer(text))
    return _decimal(numbers[-1]) if numbers else None


def short_answer(text: str) -> str | None:
    """What `text` answers, normalised so that equal answers are equal strings; None where no short answer stands out.

    The last marked answer (`####`, `\\boxed{}`, `<answer>`, "the answer is"), else the whole text if it is short.
    """
    marked = [next(part for part in found.groups() if part is not None) for found in MARKED.finditer(text)]
    answer = marked[-1] if marked else text
    if not marked and len(text.split()) > MAX_WORDS:
        return None
    return normalised(answer) or None


def normalised(answer: str) -> str:
    """Lower case, no punctuation, no articles; a lone number in its plainest form."""
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
