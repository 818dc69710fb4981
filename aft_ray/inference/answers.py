r"""The answer within a longer text. Scores, votes and early stop all read it here.

    stated_answer("So 5 + 7 = 12.\n#### 12")              "12"
    stated_answer(r"The answer is $\boxed{42}$. Check: 7") "42"
    stated_answer("答えは42です。")                          "42"
    final_number("He has 40 left, so 42.")                Fraction(42)
    short_answer("I think so. The answer is Paris.")      "paris"

An answer is stated by a mark. `<answer>`, `\boxed{}` and a line `#### 12` are strong: the last of them counts, and what
is inside a mark is read again, so `<answer>\boxed{42}</answer>` is 42. Without a strong mark, the last sentence such as
"the answer is" counts. Without any mark a short text is its own answer, and the last number of a text its number.

Only the last characters of a long text are read, in time linear in them: models write thousands of spaces or opening
tags in a row, and these functions run on the event loop of the endpoint.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from aft_ray.errors import InputError
from aft_ray.inference.numbers import Number, last_number, plain, read_number, whole_number

MOST_CHARACTERS = 20_000
"""Only so many characters from the end of a text are searched for an answer."""
MOST_STATED = 500
"""Longest stated answer; what follows "the answer is" on the same line is cut there."""
MAX_WORDS = 10
"""A text without a marked answer is its own short answer if it has at most this many words."""

UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
"""Scripts without spaces between words, as ranges of a regular expression. Each character counts as a word there."""

TAG = re.compile(r"<(?P<closing>/?)answer>", re.IGNORECASE)
BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,9}\{|\\.|[{}]", re.DOTALL)
BETWEEN_BOXES = re.compile(r"[\s$\\(),;.]{0,12}(?:and|or|和|或|と|,|;)?[\s$\\(),;.]{0,12}", re.IGNORECASE)
HASHES = re.compile(r"####[ \t]*+([^\n]*)")
NUMBER_FIRST = re.compile(r"(?:[^\w\n]|\\boxed|[A-Z]{3}(?=\s?\d)){0,12}(?:\d|\\[dt]?frac|\\sqrt)")
NUMBERED_HEADING = re.compile(r"\d{1,3}\s?[.):]\s+\S")
SAID = re.compile(
    r"(?<![^\W_])(?:answer|(?:correct|right|best) (?:option|choice)|respuesta"
    r"|réponse|resposta|risposta|antwort|antwoord|ответ|odpowiedź|cevap)"
    r"(?:\s(?:to|for|of|in)\s[^.:=\n]{1,80}?)??[\"'”*_`)\]\s]{0,8}"
    r"(?:(?:is|are|was|would be|should be|must be|will be|equals|es|est|é|è|ist|lautet|это)(?![^\W_])|[:：=])"
    r"|(?:答案|正解|解答|答え|答)[”」』\"*\s]{0,4}(?:应该是|應該是|应为|就是|等于|是|为|為|は|が|[:：=])"
    r"|(?:정답|답)[\"*\s]{0,4}(?:은|는|[:：])"
    r"|(?:(?<=\n)|\A)A[:：](?=[^\n]*+\s*+\Z)"  # the last line of GSM8K's published model solutions
    r"|(?:(?<=\n)|\A)[#*_ ]{0,8}(?:the )?(?:final )?answer[*_ ]{0,4}(?=\r?\n)",
    re.IGNORECASE,
)
LEADING = re.compile(
    r"[\s:：*_`\"“”'>=]{0,40}(?:(?:therefore|thus|hence|indeed|simply|just)(?![^\W_])[\s,]{0,5})?", re.I
)
CALCULATION = re.compile(r"<<[^<>\n]{0,200}>>")
"""A calculator's note in GSM8K's solutions, `9 * 2 = <<9*2=18>>18`."""
DENIED = re.compile(r"(?:(?i:not|no longer)\s+|不是)[^\w\n]{0,6}(?:\d|[A-Z](?![A-Za-z]))")
"""A number or a letter that is not the answer; `not enough information` may be one."""
SENTENCE_END = re.compile(
    r"(?:(?<!\.[A-Za-z])(?<!\bNo)(?<!\bRs)(?<!\bMr)(?<!\bDr)(?<!\bSt)(?<!\bvs)\.|[!?])(?=\s|$|[\"”'*)]{1,3}(?:\s|$))|[。！？]|\n"
)
COPULA_AT_END = re.compile(r"(?:でした|であり?ます|である|です|だ|입니다|이다|이에요|예요)\Z")
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:['’\-][^\W{UNSPACED}]+)*")
MATHEMATICS = re.compile(r"[\d\\√π]")
WRAPPED = " \t\r\n.,!?:;\"'“”‘’«»*`_。！？、，：；"
SIGNS = ("-", "−", "–")
MATH_WRAPPERS = re.compile(r"\A(?:\$\$?|\\\(|\\\[)\s*|\s*(?:\$\$?|\\\)|\\\])\Z")


def stated_answer(text: str) -> str | None:
    """Return the answer that a mark in `text` states, without wrappers such as `**` and `$`; None without a mark."""
    text = _end_of(text)
    found = _strongly_stated(text)
    if found is None:
        found = next((text[start:end] for start, end in _said(text)), None)
    return None if found is None else _unwrapped(found)


def find_number(text: str) -> Number | None:
    """Return the number that `text` states, else the last number in it; None where it has no number.

    Raises InputError where the answer is not one plain number but an expression, several numbers, or words.
    """
    text = _end_of(text)
    stated, after = _strongly_stated(text), ""
    if stated is None and (said := next(_said(text), None)):
        stated, after = text[slice(*said)], text[said[1] :]
    if stated is not None:
        number = read_number(_unwrapped(stated))
        if number is None and not MATHEMATICS.search(stated):  # "the answer is as follows"
            number = _last_number(after)
        if number is None:
            raise InputError(f"the answer {_unwrapped(stated)[:80]!r} is not one plain number")
        return number
    whole = text.strip()
    if len(whole) < 40 and "\n" not in whole and whole.startswith(SIGNS) and (number := whole_number(whole)):
        return number  # `- 5`, which would be an item of a list in a longer text
    return _last_number(text)


def _last_number(text: str) -> Number | None:
    try:
        return last_number(text)
    except ValueError as place:
        raise InputError(f"the last number belongs to an expression: {place}") from None


def final_number(text: str) -> Fraction | None:
    """Return the number that `text` states, else the last number in it; None where no number can be read.

    A percent sign does not change it, and `4.2 million` is 4,200,000.
    """
    try:
        number = find_number(text)
    except InputError:
        return None
    return None if number is None else number.value * number.scale


def short_answer(text: str) -> str | None:
    """Return the short answer of `text`, normalised so that equal answers are equal strings; None where there is none.

    It is the stated answer, else the whole text if it is short.
    """
    stated = stated_answer(text)
    if stated is None:
        stated = _end_of(text)
        if len(text) > MOST_CHARACTERS or num_words(stated) > MAX_WORDS:
            return None
    return normalised(stated) or None


def normalised(answer: str) -> str:
    """Return an answer in NFKC and lower case, without punctuation and articles; a lone number in its plainest form."""
    answer = plain(_unwrapped(answer))
    number = whole_number(answer)
    if number:
        return number.key
    if "\\" in answer or "^" in answer:  # mathematics, in which signs and letter case count
        return re.sub(r"[\s$]", "", answer)
    words = re.findall(r"[\w.+\-/]+", unicodedata.normalize("NFKC", answer).casefold())
    # a lone "A" is a choice, not an article
    return " ".join([word for word in words if word not in {"a", "an", "the"}] or words)


def num_words(text: str) -> int:
    """Return the number of words; each character is one in scripts without spaces. A hyphen joins two parts."""
    return sum(1 for _ in WORDS.finditer(text))


def _end_of(text: str) -> str:
    """Return the part of a text that is searched: its last characters, after any thinking."""
    return CALCULATION.sub("", text[-MOST_CHARACTERS:].rpartition("</think>")[2])


def _unwrapped(answer: str) -> str:
    for _ in range(3):
        answer = MATH_WRAPPERS.sub("", _stripped(answer))
    return COPULA_AT_END.sub("", _stripped(answer))


def _stripped(answer: str) -> str:
    return answer.rstrip(WRAPPED).lstrip(WRAPPED.replace(".", ""))  # `.5` begins with its point


def _strongly_stated(text: str) -> str | None:
    """Return what the last strong mark holds, or the strong mark within it."""
    found = None
    for _ in range(4):
        marks = [*_tagged(text), *_boxed(text), *_after_hashes(text)]
        if not marks:
            break
        found = text = max(marks)[1]
    return found


def _tagged(text: str) -> Iterator[tuple[int, str]]:
    """Yield (end, content) of each `<answer>`; the last one may be open, as where generation stops at its end tag."""
    start = None
    for tag in TAG.finditer(text):
        if tag["closing"] and start is not None:
            yield tag.end(), text[start : tag.start()]
        start = None if tag["closing"] else tag.end()
    if start is not None and text[start:].strip():
        yield len(text), text[start:]


def _boxed(text: str) -> Iterator[tuple[int, str]]:
    """Yield (end, content) of each box; contents of boxes side by side are joined by commas."""
    open_braces: list[tuple[int, int] | None] = []
    before: tuple[int, str] | None = None
    for found in BRACE.finditer(text):
        if found.group() in {"{", "}"} or (found.group().endswith("{") and len(found.group()) > 2):
            if found.group() != "}":
                open_braces.append((found.start(), found.end()) if found.group() != "{" else None)
            elif open_braces and (box := open_braces.pop()) is not None:
                content = text[box[1] : found.start()]
                if before and before[0] <= box[0] and BETWEEN_BOXES.fullmatch(text, before[0], box[0]):
                    content = f"{before[1]}, {content}"
                before = found.end(), content[:MOST_STATED]
                yield before


def _after_hashes(text: str) -> Iterator[tuple[int, str]]:
    """Yield (end, content) of each line that `####` makes an answer, and not a heading of a section."""
    last_line = len(text.rstrip())
    for found in HASHES.finditer(text):
        content = found[1].strip()
        is_number = NUMBER_FIRST.match(content) and not NUMBERED_HEADING.match(content)
        if content and (is_number or found.end() >= last_line):
            yield found.end(), content


def _said(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of what sentences such as "the answer is ..." say, the last one first."""
    for mark in reversed(list(SAID.finditer(text))):
        start = LEADING.match(text, mark.end()).end()  # type: ignore[union-attr]
        most = min(len(text), start + MOST_STATED)
        found = SENTENCE_END.search(text, start, most)
        end = found.start() if found else most
        if text[start:end].strip(WRAPPED) and not DENIED.match(text, start, end):
            yield start, end
