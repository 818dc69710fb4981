r"""Verifiers `numeric` and `math`: the answer is a number, or anything that math-verify can compare.

    score_numeric({"reference": "6 x 7 = 42\n#### 42"}, "So 42.0")                 1.0
    score_math({"reference": r"\frac{1}{2}"}, "The answer is 0.5.")                 1.0
    score_math({"reference": r"\{1, 2\}"}, r"So \boxed{2, 1}")                      1.0
    score_math({"reference": "3 km"}, "3000 m")                                     1.0
    score_math({"reference": r"5\sqrt{3}"}, r"\boxed{2\sqrt{3}}")                   0.0

A row's metadata may allow a tolerance: `relative_tolerance` as a share of the reference (0.01 is 1 %) and
`absolute_tolerance` in the reference's unit; the larger one counts.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import re
import select
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from aft_ray.data.scoring import Row
from aft_ray.errors import ConfigError, InputError
from aft_ray.inference.answers import (
    MAX_WORDS,
    MOST_CHARACTERS,
    find_number,
    normalised,
    num_words,
    short_answer,
    stated_answer,
)
from aft_ray.inference.numbers import NUMBER, Number, plain, read_number
from aft_ray.records import metadata_of

CPU_SECONDS = 5.0
"""Most CPU time of one comparison."""
REPLY_SECONDS = 120.0
"""Longest wait for the process to start and to reply, on a machine that is busy with other work."""
MOST_MATHEMATICS = 400
"""Longest answer that is given to math-verify, whose own patterns are not linear."""

MOST_SYMBOL = 6
"""Longest text without any sign of mathematics that is taken for a symbol, such as `(C)` or `xy`."""

INLINE = re.compile(r"\$([^$\n]{1,400})\$|\\\(([^\n]{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL)
WORD = re.compile(
    r"(?<![\\A-Za-z])(?:(?!(?:sin|cos|tan|log|exp|sqrt|inf|infty|and|mod|lim|max|min)(?![A-Za-z]))[A-Za-z]{3,}"
    r"|(?:an|as|at|be|by|he|if|is|it|no|of|on|so|to|we)(?![A-Za-z]))"
)
"""A word that is no function and no command: mathematics would read it as a product of letters."""
TRAILING_WORDS = re.compile(r"(?:(?<=[\d})\]π])|(?<=\\pi))\s?(?:[A-Za-z]{2,20}\s?){1,5}\Z")
MATHEMATICS = re.compile(r"[\d\\^_=<>+*/|!\[\]{}√π∞∪∩∅≤≥]")
ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]{1,20}\*?\}")
MIXED = re.compile(r"(?<![\d.])(\d{1,30}) (\d{1,30})/(\d{1,30})(?![\d/])")
SIGNS = str.maketrans(
    {"√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "≤": r"\le "}
    | {"≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "·": r"\cdot ", "±": r"\pm ", "°": r"^\circ ", "θ": r"\theta "}
)


def score_numeric(row: Row, text: str) -> float:
    """Return 1.0 if the text and the reference state the same number, else 0.0; so does a text without any number.

    Raises InputError where one of them is an expression or more than one number: task `math` compares those.
    """
    expected = find_number(row.get("reference") or "")
    if expected is None:
        raise InputError(f"no number in the reference {row.get('reference')!r}")
    found = find_number(text)
    return float(found is not None and expected.equals(found, *_tolerances(row)))


def score_math(row: Row, text: str) -> float:
    """Return 1.0 if the text and the reference state the same value, expression, set, interval or equation, else 0.0.

    A text without any answer scores 0.0. Raises InputError where an answer cannot be read or compared in time.
    """
    reference = row.get("reference") or ""
    right = plain(stated_answer(reference) or reference).strip()
    if not right:
        raise InputError("math needs a reference")
    if not MATHEMATICS.search(right) and WORD.search(right):  # `no solution`
        return _score_words(right, text)
    relative, absolute = _tolerances(row)
    expected = _number_of(right)
    answer = _answer_of(text)
    if answer is None:
        if expected is None and text.strip():
            raise InputError("no answer is stated, and there is no mathematics in the text")
        return 0.0
    found = _number_of(answer)
    if expected is not None and found is not None:
        return float(expected.equals(found, relative, absolute))
    return float(_process().compare(_latex(right), _latex(answer), relative, absolute))


def _score_words(right: str, text: str) -> float:
    if stated_answer(text) is None and num_words(text) > MAX_WORDS:
        raise InputError("no answer is stated in the text")
    return float(short_answer(text) == normalised(right))


def _tolerances(row: Row) -> tuple[float, float]:
    metadata = metadata_of(row)
    values = [metadata.get(name, 0.0) for name in ("relative_tolerance", "absolute_tolerance")]
    if not all(isinstance(value, int | float) and value >= 0 for value in values):
        raise InputError(f"relative_tolerance, absolute_tolerance: expected numbers from 0, found {values}")
    return float(values[0]), float(values[1])


def _answer_of(text: str) -> str | None:
    """Return the stated answer, else the last formula, else a text that is all mathematics, else the last number."""
    stated = stated_answer(text)
    if stated is not None:
        return plain(_last_formula(stated) or stated)
    text = text[-MOST_CHARACTERS:].strip()
    formula = _last_formula(text)
    if formula is not None:
        return plain(formula)
    if (MATHEMATICS.search(text) or len(text) <= MOST_SYMBOL) and not WORD.search(plain(text)):
        return plain(text).strip(" \n.$").removeprefix("=") or None
    number = find_number(text)
    return None if number is None else number.key


def _last_formula(text: str) -> str | None:
    formulas = [next(filter(None, found.groups())) for found in INLINE.finditer(text)]
    return formulas[-1] if formulas else None


def _number_of(answer: str) -> Number | None:
    """Return the number of an answer that is a number and, at most, words such as its unit."""
    number = read_number(answer)
    rest = NUMBER.sub("", answer.split("=")[-1], count=1)
    words = re.findall(r"[A-Za-z]+", rest)
    return (
        number if not MATHEMATICS.search(rest) and all(len(word) > 1 or word in {"a", "A"} for word in words) else None
    )


def _latex(answer: str) -> str:
    if len(answer) > MOST_MATHEMATICS:
        raise InputError(f"an answer of {len(answer)} characters is not compared as mathematics")
    latex = MIXED.sub(r"\1\\frac{\2}{\3}", TRAILING_WORDS.sub("", answer).translate(SIGNS))
    if word := WORD.search(ENVIRONMENT.sub("", latex)):
        raise InputError(f"{answer[:80]!r} is not mathematics alone: {word.group()}")
    return latex


class MathProcess:
    """The process that runs math-verify. It is started when needed, and again when it was lost."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self.cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def compare(self, reference: str, answer: str, relative: float, absolute: float) -> bool:
        """Return whether two answers in LaTeX are equal. Raises InputError with the reason where that is not known."""
        request = {"reference": reference, "answer": answer, "relative": relative, "absolute": absolute}
        with self._lock:
            reply = self._ask(json.dumps(request))
        if "reason" in reply:
            raise InputError(reply["reason"])
        return bool(reply["equal"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _ask(self, request: str) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._started()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(request.encode() + b"\n")
        has_ended_or_replied = bool(select.select([stdout], [], [], REPLY_SECONDS)[0])
        line = stdout.readline() if has_ended_or_replied else b""
        if line:
            return dict(json.loads(line))
        code = self._process.wait() if has_ended_or_replied else None
        self.close()
        if code in {-signal.SIGPROF, None}:
            return {"reason": f"math-verify needs more than {self.cpu_seconds:g} s for this comparison"}
        return {"reason": f"math-verify's process ended with exit code {code} during this comparison"}

    def _started(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError("math-verify is not installed; make setup installs it")
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_process.py")), str(self.cpu_seconds)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


@lru_cache(maxsize=1)
def _process() -> MathProcess:
    return MathProcess()
