"""Verifiers `constraints`, `ifeval` and `ifbench`: the share of a prompt's instructions that an answer follows.

The checkers of IFEval are lm-eval's copy of Google's (arXiv 2311.07911), those of IFBench the copy of AllenAI's
(arXiv 2507.02833) in the package if-verifiable. Both read an answer as it is ("strict"), in Unicode's NFC form and with
plain line ends; the metadata has the layout of IFEval's `input_data.jsonl`. Some instructions need data of nltk.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from aft_ray.data.constraints import share_met
from aft_ray.data.scoring import Row
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import metadata_of


def score_constraints(row: Row, text: str) -> float:
    """Return the share of the row's constraints that `text` meets."""
    metadata = metadata_of(row)
    if "constraints" not in metadata:
        raise InputError("no constraints in the row's metadata")
    return share_met(metadata["constraints"], text)


def score_ifeval(row: Row, text: str) -> float:
    """Return the share of the row's IFEval instructions that `text` follows ("strict"); 1.0 is prompt-level strict."""
    ids, kwargs = _instructions(row)
    checkers = _ifeval_checkers()
    example = checkers.InputExample(
        key=0, instruction_id_list=ids, prompt=row["messages"][-1]["content"], kwargs=kwargs
    )
    try:
        with _seeded(row):
            followed = checkers.test_instruction_following_strict(example, _plain(text)).follow_instruction_list
    except (KeyError, LookupError) as error:
        raise _not_checked(error) from None
    signs = [_sign_frequency(name, given, text) for name, given in zip(ids, kwargs, strict=True)]
    return sum(f if sign is None else sign for f, sign in zip(followed, signs, strict=True)) / len(followed)


def _sign_frequency(name: str, given: dict[str, Any] | None, text: str) -> bool | None:
    """Return whether a text has a sign as often as asked ("at least six !"); None for any other instruction.

    The checkers count a letter drawn by chance where the one that is asked for is not in a to z.
    """
    if name != "keywords:letter_frequency" or given is None or not given.get("letter"):
        return None
    letter, relation, frequency = (given.get(key) for key in ("letter", "let_relation", "let_frequency"))
    if not isinstance(letter, str) or not isinstance(frequency, int) or "a" <= letter.lower() <= "z":
        return None
    found = text.lower().count(letter.lower())
    return found < frequency if relation == "less than" else found >= frequency


def score_ifbench(row: Row, text: str) -> float:
    """Return the share of the row's IFBench instructions that `text` follows, strictly.

    What an instruction leaves open is drawn with the prompt's id as seed, so that every answer is checked alike.
    """
    ids, kwargs = _instructions(row)
    registry = _ifbench_checkers()
    text = _plain(text)
    if not text.strip():
        return 0.0
    try:
        followed = [_follows(registry[name](name), given, row, text) for name, given in zip(ids, kwargs, strict=True)]
    except (KeyError, LookupError) as error:
        raise _not_checked(error) from None
    return sum(followed) / len(followed)


def _follows(checker: Any, given: dict[str, Any] | None, row: Row, text: str) -> bool:
    with _seeded(row):
        checker.build_description(**{name: value for name, value in (given or {}).items() if value is not None})
        if "prompt" in (checker.get_instruction_args() or {}):
            checker.build_description(prompt=row["messages"][-1]["content"])
        return bool(checker.check_following(text))


@contextmanager
def _seeded(row: Row) -> Iterator[None]:
    """Let the checkers draw what an instruction leaves open alike for every answer to one prompt."""
    state = random.getstate()
    random.seed(str(row.get("prompt_id")))
    try:
        yield
    finally:
        random.setstate(state)


def _instructions(row: Row) -> tuple[list[str], list[dict[str, Any]]]:
    metadata = metadata_of(row)
    if not metadata.get("instruction_id_list") or "kwargs" not in metadata:
        raise InputError("no instruction_id_list and kwargs in the row's metadata")
    return metadata["instruction_id_list"], metadata["kwargs"]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def _not_checked(error: LookupError) -> InputError:
    if isinstance(error, KeyError):
        return InputError(f"the installed checkers do not know instruction {error}")
    # nltk explains a missing data file on a whole page
    return InputError(f"nltk data is missing: {' '.join(str(error).replace('*', '').split())[:200]}")


@lru_cache(maxsize=1)
def _ifeval_checkers() -> Any:
    try:
        import langdetect
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise ConfigError(f"the IFEval checkers are not installed ({error}); pip install aft-ray[ifeval]") from None
    langdetect.DetectorFactory.seed = 0  # otherwise langdetect guesses the language of a short text at random
    return utils


@lru_cache(maxsize=1)
def _ifbench_checkers() -> Any:
    try:
        import langdetect
        from if_verifiable.ifbench.instructions_registry import INSTRUCTION_DICT
    except ImportError as error:
        raise ConfigError(f"the IFBench checkers are not installed ({error}); pip install aft-ray[ifbench]") from None
    langdetect.DetectorFactory.seed = 0
    return INSTRUCTION_DICT
