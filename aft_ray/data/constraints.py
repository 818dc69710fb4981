"""Constraints on an answer that a machine can check: a closed vocabulary of small records, each with one test.

A constraint stands in a prompt's metadata as a mapping with its `type` and that type's own keys:

    check({"type": "num_bullets", "count": 3}, "- tea\\n- milk\\n- sugar")                                -> True
    check_all([{"type": "no_commas"}, {"type": "max_words", "count": 3}], "red, green and blue")          -> 0.0
    check_all([{"type": "no_commas"}, {"type": "max_words", "count": 3}], "red and green and blue")       -> 0.5

An answer without a visible character meets nothing. Letter case counts only where the type is about case; phrases and
words are compared without it, and with typographic quotes read as plain ones.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aft_ray.errors import InputError, nearest

BULLET = re.compile(r"^\s*[-*•–]\s+\S")
NUMBERED = re.compile(r"^\s*(\d+)[.)]\s+\S")
WORD = re.compile(r"\w+(?:['’\-]\w+)*")
LIST_MARK = re.compile(r"^\s*(?:[-*•–]|\d+[.)])\s+", re.MULTILINE)
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|mr|mrs|ms|dr|st|vs|a\.m|p\.m)\.(?=\s+\S)", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)*_]*(?=\s|$)|\n+")
CODE_FENCE = re.compile(r"^```\w*\n(.*)\n```$", re.DOTALL)
CLOSING = " \t\n.!?*_\"'”’)"


class Constraint(BaseModel, ABC):
    """Base of every constraint: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @abstractmethod
    def met_by(self, text: str) -> bool:
        """Whether `text`, stripped and not empty, meets the constraint."""


class _Counted(Constraint):
    count: int = Field(ge=1)


class NumBullets(_Counted):
    """Exactly `count` lines that start with -, * or •."""

    type: Literal["num_bullets"]

    def met_by(self, text: str) -> bool:
        return sum(bool(BULLET.match(line)) for line in text.splitlines()) == self.count


class NumNumbered(_Counted):
    """A numbered list with exactly `count` items, numbered 1, 2, 3 ... in this order."""

    type: Literal["num_numbered"]

    def met_by(self, text: str) -> bool:
        marks = [int(found.group(1)) for line in text.splitlines() if (found := NUMBERED.match(line))]
        return marks == list(range(1, self.count + 1))


class NumSentences(_Counted):
    """Exactly `count` sentences."""

    type: Literal["num_sentences"]

    def met_by(self, text: str) -> bool:
        return num_sentences(text) == self.count


class MaxSentences(_Counted):
    """At most `count` sentences."""

    type: Literal["max_sentences"]

    def met_by(self, text: str) -> bool:
        return num_sentences(text) <= self.count


class MaxWords(_Counted):
    """At most `count` words; a hyphenated or apostrophised word is one."""

    type: Literal["max_words"]

    def met_by(self, text: str) -> bool:
        return len(WORD.findall(text)) <= self.count


class _Worded(Constraint):
    word: str = Field(min_length=1)

    def _occurs(self, text: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(_plain(self.word))}(?!\w)", _plain(text)) is not None


class ContainsWord(_Worded):
    """`word` occurs, as a whole word."""

    type: Literal["contains_word"]

    def met_by(self, text: str) -> bool:
        return self._occurs(text)


class WithoutWord(_Worded):
    """`word` does not occur as a whole word."""

    type: Literal["without_word"]

    def met_by(self, text: str) -> bool:
        return not self._occurs(text)


class LowerCase(Constraint):
    """Letters, and none of them a capital."""

    type: Literal["lower_case"]

    def met_by(self, text: str) -> bool:
        return text.islower()


class UpperCase(Constraint):
    """Letters, and all of them capitals."""

    type: Literal["upper_case"]

    def met_by(self, text: str) -> bool:
        return text.isupper()


class _Phrased(Constraint):
    phrase: str = Field(min_length=1)


class StartsWith(_Phrased):
    """The first words are `phrase`; an opening quote or star before it does not matter."""

    type: Literal["starts_with"]

    def met_by(self, text: str) -> bool:
        phrase = _plain(self.phrase).strip(CLOSING)
        return re.match(rf"{re.escape(phrase)}(?!\w)", _plain(text).lstrip(" \n*_\"'")) is not None


class EndsWith(_Phrased):
    """The last words are `phrase`; closing punctuation and quotes after it do not matter."""

    type: Literal["ends_with"]

    def met_by(self, text: str) -> bool:
        phrase = _plain(self.phrase).strip(CLOSING)
        return re.search(rf"(?<!\w){re.escape(phrase)}$", _plain(text).rstrip(CLOSING)) is not None


class JsonKeys(Constraint):
    """A JSON object, bare or in one code fence, with exactly the given keys."""

    type: Literal["json_keys"]
    keys: list[str] = Field(min_length=1)

    def met_by(self, text: str) -> bool:
        fenced = CODE_FENCE.match(text)
        try:
            value = json.loads(fenced.group(1) if fenced else text)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and set(value) == set(self.keys)


class NoCommas(Constraint):
    """No comma anywhere."""

    type: Literal["no_commas"]

    def met_by(self, text: str) -> bool:
        return "," not in text


class DoubleQuoted(Constraint):
    """The whole answer stands between double quotes, straight or typographic."""

    type: Literal["double_quoted"]

    def met_by(self, text: str) -> bool:
        return len(text) > 2 and text[0] in '"“' and text[-1] in '"”'


class QuestionMark(Constraint):
    """A question mark occurs."""

    type: Literal["question_mark"]

    def met_by(self, text: str) -> bool:
        return "?" in text


CONSTRAINTS: dict[str, type[Constraint]] = {
    "num_bullets": NumBullets,
    "num_numbered": NumNumbered,
    "num_sentences": NumSentences,
    "max_sentences": MaxSentences,
    "max_words": MaxWords,
    "contains_word": ContainsWord,
    "without_word": WithoutWord,
    "lower_case": LowerCase,
    "upper_case": UpperCase,
    "starts_with": StartsWith,
    "ends_with": EndsWith,
    "json_keys": JsonKeys,
    "no_commas": NoCommas,
    "double_quoted": DoubleQuoted,
    "question_mark": QuestionMark,
}
"""The whole vocabulary: `type` -> record."""


def parse(constraint: Any) -> Constraint:
    """The record of one constraint mapping; InputError says which part of it is wrong."""
    if not isinstance(constraint, Mapping):
        raise InputError(
            f"constraint {constraint!r}: expected an object with `type`, found {type(constraint).__name__}"
        )
    name = constraint.get("type")
    if name not in CONSTRAINTS:
        hint = nearest(name, CONSTRAINTS, kind="types")
        raise InputError(f"constraint {dict(constraint)}: unknown type {name!r}; {hint}")
    try:
        return CONSTRAINTS[name].model_validate(dict(constraint))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors())
        raise InputError(f"constraint {dict(constraint)}: {problems}") from None


def parse_all(constraints: Any) -> list[Constraint]:
    """The records of a prompt's constraints: a list with one at least, else InputError."""
    if not isinstance(constraints, Sequence) or isinstance(constraints, str) or not constraints:
        raise InputError(f"constraints: expected a list with one constraint or more, found {constraints!r}")
    return [parse(constraint) for constraint in constraints]


def check(constraint: Mapping[str, Any], text: str) -> bool:
    """Whether `text` meets the constraint. Raises InputError for a constraint that is not in the vocabulary."""
    record, answer = parse(constraint), text.strip()
    return bool(answer) and record.met_by(answer)


def check_all(constraints: Sequence[Mapping[str, Any]], text: str) -> float:
    """Fraction of the constraints met, 0 to 1."""
    records, answer = parse_all(constraints), text.strip()
    return sum(record.met_by(answer) for record in records) / len(records) if answer else 0.0


def passes(constraints: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether every constraint is met."""
    return check_all(constraints, text) == 1.0


def num_sentences(text: str) -> int:
    """Sentences in `text`: pieces with a word in them, ended by . ! ? … before a space, or by a line break.

    List marks (`1.`, `-`) and common abbreviations (`e.g.`, `Dr.`) end nothing.
    """
    plain = ABBREVIATION.sub("abbreviation", LIST_MARK.sub("", text))
    return sum(bool(WORD.search(piece)) for piece in SENTENCE_END.split(plain))


def _plain(text: str) -> str:
    return text.casefold().replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
