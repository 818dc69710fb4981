"""Checks answers against machine-checkable constraints. Each type of constraint is a small record with one test.

The metadata of a prompt lists its constraints as mappings with a `type` and the keys of that type:

    share_met([{"type": "num_bullets", "count": 3}], "- tea\\n- milk\\n- sugar")                            -> 1.0
    share_met([{"type": "no_commas"}, {"type": "max_words", "count": 3}], "red and green and blue")       -> 0.5
    share_met([{"type": "no_commas"}, {"type": "max_words", "count": 3}], "red, green and blue")          -> 0.0

An answer without a visible character meets no constraint. Texts are compared in Unicode's NFC form. Only types that are
about letter case distinguish it; words and phrases are compared case-insensitively, with typographic quotes read as
plain ones.
"""

from __future__ import annotations

import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aft_ray.errors import InputError, nearest
from aft_ray.inference.answers import UNSPACED, num_words

BULLET = re.compile(r"^\s*[-*•–]\s+\S")
NUMBERED = re.compile(r"^\s*(\d+)(?:[.)]\s+|[、．]\s*)\S")
LIST_MARK = re.compile(r"^[^\S\n]*(?:[-*•–]|\d+[.)])[^\S\n]+", re.MULTILINE)
NEVER_LAST = re.compile(
    r"\b(?:e\.g|i\.e|cf|vs|approx|mr|mrs|ms|dr|st|prof|gen|rev|fig|no(?=\.\s+\d)|vol(?=\.\s+\d))\.(?=\s+\S)",
    re.IGNORECASE,
)
"""Abbreviations that end no sentence."""
SELDOM_LAST = re.compile(
    r"\b(?:(?:[A-Za-z]\.){1,8}[A-Za-z]|[A-Z]|etc|inc|ltd|co|corp|jr|sr|al)\.(?=\s+(?P<next>\S{1,20}))", re.IGNORECASE
)
"""Abbreviations, `U.S.` and initials, which end a sentence only where a new one visibly begins."""
FIRST_WORDS = frozenset(
    [
        "A",
        "An",
        "And",
        "As",
        "At",
        "But",
        "For",
        "He",
        "Here",
        "How",
        "However",
        "I",
        "If",
        "In",
        "It",
        "Its",
        "No",
        "Now",
        "Our",
        "She",
        "So",
        "That",
        "The",
        "Their",
        "Then",
        "There",
        "These",
        "They",
        "This",
        "Those",
        "Thus",
        "We",
        "What",
        "When",
        "Where",
        "While",
        "Who",
        "Why",
        "Yes",
        "You",
        "Your",
    ]
)
SENTENCE_END = re.compile(
    r"(?<![.!?…])(?:\.\.|…)[.…]*+(?![!?])[\"'”’)*_]*+(?=\s+[^a-z\s]|\s*\Z)"  # an ellipsis, unless it goes on
    r"|(?<![.!?…])(?:\.(?![.…])|[.…]*+[!?।؟۔])[.!?…]*+[\"'”’)*_]*+(?=\s|\Z)"
    r"|[。！？｡]++[\"”’」』）)]*+|\n+"
)
CODE_FENCE = re.compile(r"^```\w*[^\S\n]*\n(.*)\n```$", re.DOTALL)
CLOSING = " \t\n.!?*_\"'”’)。！？」』）"
COMMAS = frozenset(",，、،﹐､")
QUESTION_MARKS = frozenset("?？؟\u037e⁇⁈⁉‽")
WITHOUT_WORDS = re.compile("[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff]")
"""Thai, Lao, Tibetan, Burmese and Khmer, whose words only a dictionary tells apart."""


class Constraint(BaseModel, ABC):
    """The base class of every constraint: it is frozen and accepts no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @abstractmethod
    def met_by(self, text: str) -> bool:
        """Return whether `text`, which is stripped and not empty, meets the constraint."""


class _Counted(Constraint):
    count: int = Field(ge=1)


class NumBullets(_Counted):
    """The answer has exactly `count` lines that start with -, * or •."""

    type: Literal["num_bullets"]

    def met_by(self, text: str) -> bool:
        return sum(bool(BULLET.match(line)) for line in text.splitlines()) == self.count


class NumNumbered(_Counted):
    """The answer has a numbered list of exactly `count` items, numbered 1, 2, 3 ... in this order."""

    type: Literal["num_numbered"]

    def met_by(self, text: str) -> bool:
        marks = [int(found.group(1)) for line in text.splitlines() if (found := NUMBERED.match(line))]
        return marks == list(range(1, self.count + 1))


class NumSentences(_Counted):
    """The answer has exactly `count` sentences."""

    type: Literal["num_sentences"]

    def met_by(self, text: str) -> bool:
        return num_sentences(text) == self.count


class MaxSentences(_Counted):
    """The answer has at most `count` sentences."""

    type: Literal["max_sentences"]

    def met_by(self, text: str) -> bool:
        return num_sentences(text) <= self.count


class MaxWords(_Counted):
    """The answer has at most `count` words. A word with a hyphen or an apostrophe counts once, as does each character
    of Chinese and Japanese."""

    type: Literal["max_words"]

    def met_by(self, text: str) -> bool:
        if WITHOUT_WORDS.search(text):
            raise InputError("max_words: the words of a script without spaces cannot be counted")
        return num_words(text) <= self.count


class _Worded(Constraint):
    word: str = Field(min_length=1)

    def _occurs(self, text: str) -> bool:
        return re.search(_bounded(_plain(self.word)), _plain(text)) is not None


class ContainsWord(_Worded):
    """The answer contains `word` as a whole word."""

    type: Literal["contains_word"]

    def met_by(self, text: str) -> bool:
        return self._occurs(text)


class WithoutWord(_Worded):
    """The answer does not contain `word` as a whole word."""

    type: Literal["without_word"]

    def met_by(self, text: str) -> bool:
        return not self._occurs(text)


class LowerCase(Constraint):
    """The answer has letters, and all of them are lower case."""

    type: Literal["lower_case"]

    def met_by(self, text: str) -> bool:
        return text.islower()


class UpperCase(Constraint):
    """The answer has letters, and all of them are upper case."""

    type: Literal["upper_case"]

    def met_by(self, text: str) -> bool:
        return text.isupper()


class _Phrased(Constraint):
    phrase: str = Field(min_length=1)


class StartsWith(_Phrased):
    """The answer starts with `phrase`; opening quotes and asterisks before it are ignored."""

    type: Literal["starts_with"]

    def met_by(self, text: str) -> bool:
        phrase = _plain(self.phrase).strip(CLOSING)
        return re.match(_bounded(phrase, before=False), _plain(text).lstrip(" \n*_\"'「『")) is not None


class EndsWith(_Phrased):
    """The answer ends with `phrase`; closing punctuation and quotes after it are ignored."""

    type: Literal["ends_with"]

    def met_by(self, text: str) -> bool:
        phrase = _plain(self.phrase).strip(CLOSING)
        return re.search(_bounded(phrase) + r"\Z", _plain(text).rstrip(CLOSING)) is not None


class JsonKeys(Constraint):
    """The answer is a JSON object, bare or in one code fence, with exactly the given keys."""

    type: Literal["json_keys"]
    keys: list[str] = Field(min_length=1)

    def met_by(self, text: str) -> bool:
        fenced = CODE_FENCE.match(text)
        try:
            value = json.loads(fenced.group(1) if fenced else text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and set(value) == set(self.keys)


class NoCommas(Constraint):
    """The answer contains no comma."""

    type: Literal["no_commas"]

    def met_by(self, text: str) -> bool:
        return not COMMAS & set(text)


class DoubleQuoted(Constraint):
    """The whole answer is enclosed in double quotes, straight or typographic."""

    type: Literal["double_quoted"]

    def met_by(self, text: str) -> bool:
        return len(text) > 2 and text[0] in '"“„＂' and text[-1] in '"”“＂'


class QuestionMark(Constraint):
    """The answer contains a question mark."""

    type: Literal["question_mark"]

    def met_by(self, text: str) -> bool:
        return bool(QUESTION_MARKS & set(text))


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
"""The record of each `type`."""


def parse(constraint: Any) -> Constraint:
    """Return the record of one constraint mapping. Raises InputError, which says what is wrong with the mapping."""
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
    """Return the records of a prompt's constraints. Raises InputError unless they are a non-empty list."""
    if not isinstance(constraints, Sequence) or isinstance(constraints, str) or not constraints:
        raise InputError(f"constraints: expected a list of at least one constraint, found {constraints!r}")
    return [parse(constraint) for constraint in constraints]


def share_met(constraints: Sequence[Mapping[str, Any]], text: str) -> float:
    """Return the share of the constraints that `text` meets, 0 to 1.

    Raises InputError for an invalid constraint, and for one that cannot be checked in the text's script.
    """
    records = parse_all(constraints)
    answer = unicodedata.normalize("NFC", text.replace("\r\n", "\n")).strip()
    return sum(record.met_by(answer) for record in records) / len(records) if answer else 0.0


def num_sentences(text: str) -> int:
    """Return the number of sentences in `text`.

    A sentence contains a word and ends with . ! ? or … before a space, with 。！？ or with a line break. List marks
    (`1.`, `-`) and abbreviations (`e.g.`, `Dr.`, `No. 5`) do not end a sentence. Initials, `U.S.` and `Inc.` do before
    a word that often begins one (`He`, `The`), and an ellipsis does not before a small letter.
    """
    plain = NEVER_LAST.sub("abbreviation", LIST_MARK.sub("", text))
    plain = SELDOM_LAST.sub(lambda found: found.group() if found["next"] in FIRST_WORDS else "abbreviation", plain)
    return sum(bool(re.search(r"\w", piece)) for piece in SENTENCE_END.split(plain))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bounded(words: str, before: bool = True) -> str:
    """Return a pattern for whole words; in scripts without spaces any place is a boundary."""
    start = rf"(?<![^\W{UNSPACED}])" if before and not re.match(f"[{UNSPACED}]", words) else ""
    end = rf"(?![^\W{UNSPACED}])" if not re.search(rf"[{UNSPACED}]\Z", words) else ""
    return start + re.escape(words) + end


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFC", text).casefold()
    return text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"')
