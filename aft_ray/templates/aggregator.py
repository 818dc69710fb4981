"""The aggregator prompt: a system message with the proposals in numbered slots, before the unchanged conversation.

    template = AggregatorTemplate.load("aft")              # or a YAML file: docs/templates.md
    template.messages(conversation, ["Paris.", "It is Lyon."])

    system     <the conversation's own system text, if any>

               <what an aggregator must do>

               [Draft 1]
               Paris.
               [End of draft 1]

               [Draft 2]
               It is Lyon.
               [End of draft 2]
    user       What is the capital of France?

Proposals are data. They are inserted by splitting the template, never by formatting, so braces in them survive. With
`escape`, a zero-width space (U+200B) breaks the slot's own marks inside them, so that no proposal can close its slot or
fake another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from aft_ray.errors import ConfigError, InputError
from aft_ray.records import Message, fingerprint
from aft_ray.templates.assets import read_fields
from aft_ray.templates.control import broken

_PLACE = re.compile(r"(\{index\}|\{proposal\})")


@dataclass(frozen=True, kw_only=True)
class AggregatorTemplate:
    """The text of the aggregator prompt around the proposals."""

    PACKAGED: ClassVar[dict[str, str]] = {"aft": "aft.yaml", "bare": "bare.yaml"}

    name: str
    system: str
    """Text of the system message. It must contain `{proposals}`, the place of the slots, exactly once."""
    slot: str
    """Text of one slot. It must contain `{index}`, which counts from 1, and `{proposal}` exactly once."""
    separator: str = "\n\n"
    """Text between two slots."""
    escape: bool = True
    """Whether to break the slot's marks inside proposals. False suits checkpoints trained on a published prompt."""

    def __post_init__(self) -> None:
        _require(self.name, "system", self.system, "{proposals}", once=True)
        _require(self.name, "slot", self.slot, "{proposal}", once=True)
        _require(self.name, "slot", self.slot, "{index}", once=False)

    @classmethod
    def load(cls, reference: str = "aft") -> AggregatorTemplate:
        """Load a packaged template by name, or a YAML file; `name`, `separator` and `escape` are optional in it."""
        required = {"system": str, "slot": str}
        optional = {"name": str, "separator": str, "escape": bool}
        fields = read_fields(
            reference, kind="aggregator template", packaged=cls.PACKAGED, required=required, optional=optional
        )
        return cls(**fields)

    @property
    def hash(self) -> str:
        """sha256 of everything that shapes the prompt, which excludes the name."""
        return fingerprint(["aggregator", self.system, self.slot, self.separator, self.escape])

    def messages(self, conversation: Sequence[Message], proposals: Sequence[str]) -> tuple[Message, ...]:
        """Return the conversation under a system message with the proposals. Raises InputError without proposals."""
        if not proposals:
            raise InputError("an aggregation needs at least one proposal, found none")
        before, after = self.system.split("{proposals}")
        slots = (self._slot(number, text) for number, text in enumerate(proposals, start=1))
        system = before + self.separator.join(slots) + after
        rest = tuple(conversation)
        if rest and rest[0]["role"] == "system":
            system, rest = f"{rest[0]['content']}\n\n{system}", rest[1:]
        return (Message(role="system", content=system), *rest)

    def _slot(self, number: int, proposal: str) -> str:
        text = broken(proposal, slot_marks(self.slot)) if self.escape else proposal
        values = {"{index}": str(number), "{proposal}": text}
        return "".join(values.get(part, part) for part in _PLACE.split(self.slot))


@lru_cache(maxsize=32)
def slot_marks(slot: str) -> re.Pattern[str] | None:
    """Return a pattern for the slot's marks as a proposal might forge them: any number, any case, any spacing.

    The marks of `[Draft {index}]\\n{proposal}\\n[End of draft {index}]` are its first and last line. A mark that begins
    with its number (`{index}. {proposal}`) matches at the start of a line only: elsewhere it is an ordinary number.
    """
    lines = [line.strip() for piece in slot.split("{proposal}") for line in piece.splitlines()]
    marks = sorted({_mark(line) for line in lines if line})
    return re.compile("|".join(marks), re.IGNORECASE | re.MULTILINE) if marks else None


def _mark(line: str) -> str:
    """Return a pattern that consumes only the first character of a mark, so that marks may overlap (see `broken`)."""
    pattern = "".join(r"\s*\d+\s*" if part == "{index}" else _spaced(part) for part in _PLACE.split(line) if part)
    if line.startswith("{index}"):
        return rf"^[^\S\n]*(?={pattern})\d"
    return rf"(?={pattern})\S"


def _spaced(text: str) -> str:
    return r"\s*".join(re.escape(word) for word in re.findall(r"\w+|[^\w\s]", text))


def _require(name: str, key: str, text: str, place: str, *, once: bool) -> None:
    found = text.count(place)
    if found == 0 or (once and found > 1):
        expected = "exactly once" if once else "at least once"
        raise ConfigError(f"aggregator template {name}: '{key}' contains {place} {found} times, expected {expected}")
