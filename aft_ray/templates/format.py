"""How messages become a model's input: the `PromptFormat` protocol, and its implementation for engines without ids.

There are two implementations. `ChatFormat` (chat.py) has a tokenizer, so its ids are what the model sees and its counts
are exact. `MessagesFormat` is for endpoints that take messages only, so it has no ids, and it estimates counts from
above.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from aft_ray.errors import InputError
from aft_ray.records import Message, all_text, fingerprint
from aft_ray.templates.control import without_surrogates

ROLES = ("system", "developer", "user", "assistant", "tool")


class PromptFormat(Protocol):
    """Converts the messages of a conversation to the input of a model."""

    @property
    def has_template(self) -> bool:
        """Whether a chat template shapes the prompt. If not, the in-context prompt or the endpoint does."""
        ...

    @property
    def template_hash(self) -> str:
        """Identity of the text around the messages: sha256 of the chat template or of the in-context prompt."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end an answer and are not part of it."""
        ...

    @property
    def vocabulary_size(self) -> int | None:
        """Number of ids that the tokenizer has; a larger id means nothing to it. None where it is not known."""
        ...

    @property
    def takes_tools(self) -> bool:
        """Whether the prompt has a place for tools that the model may call."""
        ...

    @property
    def template_arguments(self) -> frozenset[str]:
        """Names of what the chat template can be told besides messages and tools, such as `enable_thinking`."""
        ...

    def rendering(self, tools: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> PromptFormat:
        """Return this format with prompts that describe the tools, and those of the arguments that it knows."""
        ...

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return everything before the answer, generation prompt included; () for an engine that takes messages."""
        ...

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text as it is, with the BOS that begins every text of this model. Control tokens in it
        act as such: nothing is neutralised. () for an engine that takes messages."""
        ...

    def target_ids(self, messages: Sequence[Message], target: str) -> tuple[int, ...]:
        """Return what the answer `target` adds to `prompt_ids`, its end-of-turn token included."""
        ...

    def count(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of the prompt."""
        ...

    def num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text by itself."""
        ...

    def cut(self, text: str, max_tokens: int) -> str:
        """Return the beginning of `text`, at most `max_tokens` long."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens included."""
        ...

    def neutralise(self, text: str) -> str:
        """Return `text` as a message may contain it: nothing in it can act as a control token."""
        ...


def checked(messages: Sequence[Message]) -> None:
    """Raise InputError for a conversation that no format can render."""
    if not messages:
        raise InputError("a conversation needs at least one message, found none")
    for number, message in enumerate(messages, start=1):
        if message.get("role") not in ROLES:
            raise InputError(f"message {number} has role {message.get('role')!r}, expected {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"message {number} has content {message.get('content')!r}, expected text")


class MessagesFormat:
    """The format for endpoints that take messages: sends them unchanged and estimates their length from above."""

    BYTES_PER_TOKEN = 3
    """English has about 4 characters per token; other scripts rarely exceed one token per 3 bytes."""
    TOKENS_PER_MESSAGE = 4
    """Number of control tokens around a turn."""

    has_template = False
    takes_tools = True
    """The endpoint has templates of its own: tools and arguments go there with the request."""
    template_arguments: frozenset[str] = frozenset()
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    vocabulary_size: int | None = None
    template_hash = fingerprint(["messages"])

    def rendering(self, tools: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> MessagesFormat:
        return self

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        checked(messages)
        return ()

    def text_ids(self, text: str) -> tuple[int, ...]:
        return ()

    def target_ids(self, messages: Sequence[Message], target: str) -> tuple[int, ...]:
        return ()

    def count(self, messages: Sequence[Message]) -> int:
        checked(messages)
        return sum(self.TOKENS_PER_MESSAGE + self.num_tokens(all_text(message)) for message in messages)

    def num_tokens(self, text: str) -> int:
        return math.ceil(len(self.neutralise(text).encode()) / self.BYTES_PER_TOKEN)

    def cut(self, text: str, max_tokens: int) -> str:
        return self.neutralise(text).encode()[: max_tokens * self.BYTES_PER_TOKEN].decode(errors="ignore")

    def decode(self, ids: Sequence[int]) -> str:
        if ids:
            raise InputError(
                f"cannot decode {len(ids)} ids: this engine takes messages, and its tokenizer is not known"
            )
        return ""

    def neutralise(self, text: str) -> str:
        """Replace only what UTF-8 cannot encode: the endpoint renders the messages."""
        return without_surrogates(text)
