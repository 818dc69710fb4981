"""The prompt for base models, which have no chat template: demonstrations in the URIAL format (arXiv 2312.01552).

    # Instruction

    <what the blocks are>

    # Query:
    `````
    <demonstration>
    `````

    # Answer:
    `````
    <its answer>
    `````

    # Query:
    `````
    <the user's message>
    `````

    # Answer:
    `````
                             <- the model continues here; its closing fence is the stop string

Earlier turns of the conversation are further blocks. A system message, such as the aggregator's, is a second
instruction in a fence directly before the conversation, so that all prompts share the tokens of the demonstrations.
U+200B breaks fences and headings inside a message, so that no text can close its block. The fences have five backticks,
where URIAL's have three, so that an answer may hold a block of code: a fence ends a block only if it is as long as the
one that opened it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from aft_ray.errors import ConfigError, InputError
from aft_ray.records import Message, fingerprint
from aft_ray.templates.assets import read_fields
from aft_ray.templates.control import break_strings, broken, without_surrogates

_FENCE = "`````"
_FENCES = break_strings([_FENCE])
_HEADINGS = re.compile(r"^#(?= (?:Instruction|Query:|Answer:))", re.MULTILINE)
_HEADING_OF = {"system": "# Instruction", "user": "# Query:", "assistant": "# Answer:"}


@dataclass(frozen=True, kw_only=True)
class InContextPrompt:
    """An instruction and demonstrations that make a base model answer."""

    PACKAGED: ClassVar[dict[str, str]] = {"default": "in_context.yaml"}

    name: str
    instruction: str
    demonstrations: tuple[tuple[str, str], ...]
    """Pairs of query and answer."""

    @classmethod
    def load(cls, reference: str = "default") -> InContextPrompt:
        """Load `default`, or a YAML file with `instruction` and `demonstrations` (a list of `query` and `answer`)."""
        kind = "in-context prompt"
        required = {"instruction": str, "demonstrations": list}
        fields = read_fields(reference, kind=kind, packaged=cls.PACKAGED, required=required, optional={"name": str})
        pairs = tuple(_pair(reference, number, item) for number, item in enumerate(fields["demonstrations"], start=1))
        return cls(name=fields["name"], instruction=fields["instruction"], demonstrations=pairs)

    @property
    def hash(self) -> str:
        """sha256 of everything that shapes the prompt, which excludes the name."""
        return fingerprint(["in_context", _FENCE, self.instruction, self.demonstrations])

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The closing fence, first with its line break, so that the answer does not keep the line break."""
        return ("\n" + _FENCE, _FENCE)

    @property
    def closing(self) -> str:
        """The text that ends an answer in a full conversation."""
        return "\n" + _FENCE

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt up to and including the opening fence of the answer."""
        parts = [f"# Instruction\n\n{self.instruction.strip()}"]
        for query, answer in self.demonstrations:
            parts += [self._block("user", query), self._block("assistant", answer)]
        parts += [self._block(message["role"], message["content"]) for message in messages]
        return "\n\n".join([*parts, f"{_HEADING_OF['assistant']}\n{_FENCE}\n"])

    def neutralise(self, text: str) -> str:
        """Return `text` without anything that could close its block or open another one."""
        return broken(broken(without_surrogates(text), _FENCES), _HEADINGS)

    def _block(self, role: str, content: str) -> str:
        if role not in _HEADING_OF:
            raise InputError(f"in-context prompt: no block for role '{role}'; known roles: {', '.join(_HEADING_OF)}")
        return f"{_HEADING_OF[role]}\n{_FENCE}\n{self.neutralise(content)}\n{_FENCE}"


def _pair(reference: str, number: int, item: object) -> tuple[str, str]:
    """Check one demonstration of a file and return its query and answer."""
    if not isinstance(item, dict) or set(item) != {"query", "answer"}:
        found = sorted(map(str, item)) if isinstance(item, dict) else type(item).__name__
        raise ConfigError(f"{reference}: demonstration {number} has {found}, expected the keys query and answer")
    for key, text in item.items():
        if not isinstance(text, str) or _FENCE in text:
            raise ConfigError(
                f"{reference}: demonstration {number}, {key}: expected text without {_FENCE}, which ends an answer"
            )
    return item["query"], item["answer"]
