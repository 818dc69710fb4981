"""What a check has found: a line of `aft-ray doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: what was found and, where it is a problem, what to do."""

    kind: Literal["ok", "note", "problem"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.kind:<8} {self.text}" + (f". {self.remedy}" if self.remedy else "")


def ok(text: str) -> Finding:
    """Return what is as it should be."""
    return Finding(kind="ok", text=text)


def note(text: str, remedy: str = "") -> Finding:
    """Return what is worth knowing, but nothing that would end a run."""
    return Finding(kind="note", text=text, remedy=remedy)


def problem(text: str, remedy: str = "") -> Finding:
    """Return what would end a run, and what to do about it."""
    return Finding(kind="problem", text=text, remedy=remedy)
