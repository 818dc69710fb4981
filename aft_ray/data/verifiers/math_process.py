"""Compares mathematical answers with math-verify: the process that `maths.py` starts, and that may be lost.

    python math_process.py SECONDS
    {"reference": "\\\\frac{1}{2}", "answer": "0.5", "relative": 0.0, "absolute": 0.0}     one line in
    {"equal": true}    or    {"reason": "..."}                                            one line out

SymPy may compute for hours (`10^{10^{10}}`) in code that no exception interrupts, and math-verify's own time limit
works in a main thread only. So a comparison that takes more than SECONDS of CPU time ends this process: the timer's
signal has its default effect. It imports nothing of aft_ray, so that it starts quickly.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

MEMORY_BYTES = 4 * 2**30
ROUNDING = 1e-12
"""Relative difference that numeric evaluation may leave between equal values."""


@lru_cache(maxsize=1024)
def parsed(latex: str) -> list[Any]:
    """Return what math-verify reads; empty where it reads nothing."""
    config = LatexExtractionConfig(boxed_match_priority=0)
    text = f"\\boxed{{{latex}}}"
    return parse(text, extraction_config=[config], fallback_mode="no_fallback", parsing_timeout=None)


def compare(reference: str, answer: str, relative: float, absolute: float) -> dict[str, Any]:
    """Return {"equal": ...}, or {"reason": ...} where one of the two cannot be read."""
    expected, found = parsed(reference), parsed(answer)
    for name, latex, read in (("reference", reference, expected), ("answer", answer, found)):
        if not read:
            return {"reason": f"math-verify cannot read the {name} {latex[:200]!r}"}
    equal = verify(expected, found, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)
    if not equal and not (expected[0].free_symbols or found[0].free_symbols):
        right, near = _value(expected[0]), _value(found[0])
        if right is not None and near is not None:
            equal = abs(right - near) <= max(absolute, max(relative, ROUNDING) * abs(right))
    return {"equal": bool(equal)}


def _value(expression: Any) -> complex | None:
    try:
        return complex(expression.evalf())
    except (TypeError, ValueError, AttributeError, OverflowError):  # a set, a relation, a matrix
        return None


def main() -> None:
    """Compare the answers of each line of stdin, within the CPU seconds that the first argument gives each of them."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        try:
            reply = compare(**json.loads(line))
        except Exception as error:  # SymPy raises anything on what a model may write
            reply = {"reason": f"math-verify: {type(error).__name__}: {str(error)[:200]}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
