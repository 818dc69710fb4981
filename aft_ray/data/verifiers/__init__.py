"""Checks answers to tasks that a program can judge. A verifier returns a number from 0 to 1, and 1.0 means correct.

task           the number is                                                    and the row needs
constraints    the share of the prompt's constraints that the answer meets      metadata.constraints
numeric        1 if the answer states the number of the reference, else 0       reference
math           1 if math-verify finds answer and reference equal, else 0        reference
choice         1 if the answer chooses the option of the reference, else 0      reference; metadata.choices for texts
exact          1 if the answer is the reference in other spelling, else 0       reference; metadata.aliases for others
reasoning_gym  the score of the task's own scorer                               metadata.reasoning_gym
ifeval         the share of the prompt's IFEval instructions that are followed  metadata.instruction_id_list, kwargs
ifbench        the same for IFBench                                             metadata.instruction_id_list, kwargs
a function     what your own function returns: `scores.verifier: mypackage.mymodule:function`

What cannot be compared has no number but a reason: a verifier raises InputError.

    verify(row, "- tea\\n- milk")     # True, False, or None if the row's task has no verifier or nothing can be said

    constraints.py is in `data/`        maths.py, math_process.py    numeric and math
    choice.py, exact.py                 instructions.py              constraints, ifeval and ifbench
    gym.py    reasoning_gym             own.py                       a user's function
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from aft_ray.data.scoring import Row, Score
from aft_ray.data.verifiers.choice import score_choice
from aft_ray.data.verifiers.exact import score_exact
from aft_ray.data.verifiers.gym import score_reasoning_gym
from aft_ray.data.verifiers.instructions import score_constraints, score_ifbench, score_ifeval
from aft_ray.data.verifiers.maths import score_math, score_numeric
from aft_ray.data.verifiers.own import OwnVerifier
from aft_ray.errors import ConfigError

logger = logging.getLogger(__name__)

Verifier = Callable[[Row, str], float]
Result = TypeVar("Result")

VERIFIERS: dict[str, Verifier] = {
    "constraints": score_constraints,
    "numeric": score_numeric,
    "math": score_math,
    "choice": score_choice,
    "exact": score_exact,
    "reasoning_gym": score_reasoning_gym,
    "ifeval": score_ifeval,
    "ifbench": score_ifbench,
}
"""The verifier of each task."""

_ONE_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verifier")
"""Verifiers of other projects keep state that several threads must not share."""


def verifier_of(row: Row, named: str | None = None) -> tuple[str, Verifier] | None:
    """Return the name and the function of the verifier that `scores.verifier` names, else of the row's task, or None.

    Raises ConfigError where the function that is named cannot be imported.
    """
    name = named or row.get("task") or ""
    if name in VERIFIERS:
        return name, VERIFIERS[name]
    return (name, OwnVerifier.load(name)) if named else None  # a row cannot name a function: it may come from anywhere


def verify(row: Row, text: str, named: str | None = None) -> bool | None:
    """Return whether a verifier accepts `text`, or None if there is none or it cannot tell."""
    verifier = verifier_of(row, named)
    if verifier is None:
        return None
    value = score_text(*verifier, row, text).value
    return None if value is None else value >= 1.0


def score_text(name: str, function: Verifier, row: Row, text: str) -> Score:
    """Score one text with `function`; if it raises, the error becomes the reason, so that one text ends no stage."""
    try:
        return Score(value=function(row, text))
    except ConfigError:  # a package is missing, and every other row would fail the same way
        raise
    except Exception as error:  # foreign code reads model output here, and anything may happen
        logger.warning("scorer %s, prompt %s: %r", name, row.get("prompt_id"), error)
        return Score(value=None, reason=f"{type(error).__name__}: {error}")


def verifier_settings(named: str | None) -> dict[str, str]:
    """Return what decides the verdicts of `scores.verifier`, for fingerprints: nothing where it is not set."""
    if named is None:
        return {}
    return {"verifier": named if named in VERIFIERS else f"{named} {OwnVerifier.load(named).identity()}"}


async def off_loop(function: Callable[..., Result], *args: Any) -> Result:
    """Call `verify` or `score_text` beside the event loop, which a slow verifier would hold up. One runs at a time."""
    return await asyncio.get_running_loop().run_in_executor(_ONE_THREAD, partial(function, *args))
