r"""Verifier `choice`: the answer chooses the right one of several options.

    options = {"reference": "B", "metadata": '{"choices": ["Lyon", "Paris", "Nice"]}'}
    score_choice(options, "The answer is (B).")         1.0
    score_choice(options, "**B) Paris**")               1.0
    score_choice(options, "The answer is Paris.")       1.0
    score_choice(options, r"\boxed{\text{A}}")          0.0
    score_choice(options, "A or B")                     raises InputError: two options

The reference is a letter, a label, the text of an option or, where `choices` holds texts only, the option's number from
0 on. `choices` (or `options`) is a list of texts, with or without their letters, or {"text": [...], "label": [...]}.
Without it the reference is a letter.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from aft_ray.data.scoring import Row
from aft_ray.errors import InputError
from aft_ray.inference.answers import MOST_CHARACTERS, normalised, stated_answer
from aft_ray.inference.numbers import plain
from aft_ray.records import metadata_of

BEGINNING = re.compile(
    r"[\s*_\"'“「]{0,8}(?:(?:option|choice|选项|選択肢|选|選)\s{0,3})?[(\[（]?(?P<label>\w{1,4})(?![^\W_])[)\]）]?",
    re.IGNORECASE,
)
"""The label of an option at the beginning of an answer."""
CHOSEN = re.compile(
    r"(?i:option|choice|选项|選択肢|选|選)\s{0,3}[(（]?([A-Z])(?![^\W_])|[(（]([A-Z])[)）]|\*\*([A-Z])[.)]?\*\*"
    r"|(?<![^\W_])([A-Z]) is (?:the )?(?:correct|right|best|answer)|(?<![^\W_])is ([A-Z])[.!]?\s*+\Z"
    r"|(?<![^\W_])(?i:ans(?:wer)?)[\s:.=*–-]{1,6}[(（]?([A-Z])(?=[*.)）]{0,4}(?:\n|\Z))"
)
REASONS = frozenset({"because", "since", "as", "is", "which"})
"""Words behind the label `A`, elsewhere an article, that begin a reason for the choice."""
FURTHER = re.compile(
    r"[\s*_.]{0,6}(?:,|/|&|or|and|和|或|と)[\s*_(\[（]{0,6}(?P<label>\w{1,4})(?![^\W_])", re.IGNORECASE
)
"""Another option behind the first."""


def score_choice(row: Row, text: str) -> float:
    """Return 1.0 if `text` chooses the reference's option, else 0.0; an empty text chooses none.

    Raises InputError where the text names no option, or more than one.
    """
    metadata = metadata_of(row)
    options = _options(metadata.get("choices", metadata.get("options")))
    right = _right(row.get("reference"), options)
    if not text.strip():
        return 0.0
    return float(_chosen(text, options) == right)


def _options(choices: Any) -> dict[str, str]:
    """Return the text of each option by its label, in upper case."""
    if choices is None:
        return {letter: "" for letter in string.ascii_uppercase}
    texts = choices.get("text") if isinstance(choices, Mapping) else choices
    labels = choices.get("label") if isinstance(choices, Mapping) else list(string.ascii_uppercase)[: len(texts or [])]
    if not isinstance(texts, list) or not isinstance(labels, list) or not texts or len(texts) != len(labels):
        raise InputError(f"choices: expected a list of texts, or text and label of equal length, found {choices!r}")
    return {str(label).upper(): _bare(str(text), str(label)) for label, text in zip(labels, texts, strict=True)}


def _bare(text: str, label: str) -> str:
    """Return an option's text without its label: `A) Lyon` is Lyon."""
    return re.sub(rf"\A\(?{re.escape(label)}[).:]\s*", "", text, flags=re.IGNORECASE)


def _right(reference: Any, options: Mapping[str, str]) -> str:
    answer = plain(stated_answer(reference or "") or reference or "").strip()
    found = {_labelled(answer, options), _by_text(answer, options)} - {None}
    if answer.isdecimal() and any(options.values()) and answer not in options and int(answer) < len(options):
        found.add(list(options)[int(answer)])
    if len(found) != 1:
        problem = "more than one" if found else "none"
        raise InputError(f"the reference {reference!r} is {problem} of the options {', '.join(list(options)[:8])}")
    return str(found.pop())


def _chosen(text: str, options: Mapping[str, str]) -> str:
    stated = stated_answer(text)
    answer = plain(text.strip().splitlines()[-1] if stated is None else stated).strip()
    found = _by_text(answer, options) or _labelled(answer, options, is_stated=stated is not None)
    if found is not None:
        return found
    marked = {"".join(found) for found in CHOSEN.findall(text[-MOST_CHARACTERS:] if stated is None else answer)}
    if len(marked & options.keys()) == 1:
        return (marked & options.keys()).pop()
    raise InputError(f"no single option is chosen in {answer[:80]!r}")


def _labelled(answer: str, options: Mapping[str, str], is_stated: bool = True) -> str | None:
    """Return the label at the beginning of an answer, unless what follows makes it an ordinary word (`A cat`)."""
    found = BEGINNING.match(answer)
    if found is None or (label := found["label"].upper()) not in options:
        return None
    rest = answer[found.end() :]
    following = re.match(r"\s(\w{1,20})", rest)
    further = FURTHER.match(rest)
    if further is not None and further["label"].upper() in options:
        raise InputError(f"more than one option is chosen in {answer[:80]!r}")
    texts = {normalised(rest.lstrip(between)) for between in (" .:：,)]*", " :：,)]*")}  # `B. 1011`, `B) .1011`
    is_whole = bool(texts & {"", normalised(options[label])})
    is_marked = following is None or following[1] in REASONS or found["label"] not in {"A", "I", "a", "i"}
    return label if is_whole or (is_stated and is_marked) else None


def _by_text(answer: str, options: Mapping[str, str]) -> str | None:
    wanted = normalised(answer)
    found = [label for label, text in options.items() if text and normalised(text) == wanted]
    return found[0] if len(found) == 1 else None
