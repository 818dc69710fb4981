"""Tokenizing off the event loop: a megabyte of text would stop every other run for a second."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from aft_ray.records import Message, all_text

T = TypeVar("T")

LONG_TEXT = 20_000
"""Number of characters that take about 10 ms to tokenize."""


async def off_loop(num_characters: int, function: Callable[..., T], *args: Any) -> T:
    """Call `function`, which tokenizes: for long texts in a thread, so that it does not block the event loop.

    For short texts a thread would cost more than the tokenizing.
    """
    if num_characters < LONG_TEXT:
        return function(*args)
    return await asyncio.to_thread(function, *args)


def num_characters(messages: Sequence[Message]) -> int:
    """Number of characters in a conversation."""
    return sum(len(all_text(message)) for message in messages)
