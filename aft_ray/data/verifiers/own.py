"""A verifier of the user's own: `scores.verifier: mypackage.mymodule:function`.

    def function(row, text):                          # in mypackage/mymodule.py
        return text.strip() == row["reference"]

`row` has prompt_id, messages, reference, task and metadata (`aft_ray.records.metadata_of(row)` reads it). The function
returns True or False, a number from 0 to 1 of which 1 means correct, or None where it cannot tell; it may raise an
exception with the reason instead. The module is found like any other, or in the current folder.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aft_ray.data.scoring import Row
from aft_ray.errors import ConfigError, InputError

EXPECTED = "expected True, False, a number from 0 to 1, or None"


@dataclass(frozen=True)
class OwnVerifier:
    """A function by its import path. It is imported where it is first called, so that the record can travel."""

    path: str

    @staticmethod
    @lru_cache(maxsize=8)
    def load(path: str) -> OwnVerifier:
        """Return the verifier. Raises ConfigError where there is no such function."""
        _function(path)
        return OwnVerifier(path)

    def __call__(self, row: Row, text: str) -> float:
        """Return the function's verdict as a number. Raises InputError where it gave none."""
        verdict = _function(self.path)(row, text)
        if verdict is None:
            raise InputError("the verifier gave no verdict")
        if not _is_verdict(verdict):
            raise InputError(f"the verifier returned {verdict!r}; {EXPECTED}")
        return float(verdict)

    def check(self, row: Row) -> None:
        """Call the function once with a row and its reference as the answer. Raises ConfigError if that fails."""
        text = row.get("reference") or "an answer"
        try:
            verdict = _function(self.path)(row, text)
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"scores.verifier {self.path} failed on the prompt {row.get('prompt_id')} with the answer "
                f"{text[:80]!r}: {type(error).__name__}: {error}"
            ) from error
        if verdict is not None and not _is_verdict(verdict):
            raise ConfigError(
                f"scores.verifier {self.path} returned {verdict!r} for the prompt {row.get('prompt_id')}; {EXPECTED}"
            )

    def source(self) -> Path | None:
        """Return the file of the function's module, if it has one."""
        found = inspect.getsourcefile(inspect.unwrap(_function(self.path)))
        return Path(found) if found else None

    def identity(self) -> str:
        """Return a hash of the module's content: another function gives other scores."""
        source = self.source()
        return hashlib.sha256(source.read_bytes()).hexdigest()[:16] if source else self.path


def _is_verdict(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1


@lru_cache(maxsize=8)
def _function(path: str) -> Callable[[Row, str], Any]:
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not have the current folder
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(
            f"scores.verifier {path}: cannot import {module_name}: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if function is None:
        known = [found for found, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"scores.verifier {path}: {module_name} has no {name}; its functions: {', '.join(known) or 'none'}"
        )
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        raise ConfigError(f"scores.verifier {path}: expected a function of (row, text): {error}") from None
    return function  # type: ignore[no-any-return]
