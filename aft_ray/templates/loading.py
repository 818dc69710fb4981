"""The format that an engine needs, for data, serving and evaluation alike."""

from __future__ import annotations

from aft_ray.templates.chat import ChatFormat, Style
from aft_ray.templates.format import MessagesFormat, PromptFormat
from aft_ray.templates.in_context import InContextPrompt


def load_format(tokenizer: str | None, in_context: str = "default", style: Style = "auto") -> PromptFormat:
    """Return the `ChatFormat` of a tokenizer (folder or hub id), or `MessagesFormat` for an engine without one."""
    if tokenizer is None:
        return MessagesFormat()
    return ChatFormat.load(tokenizer, InContextPrompt.load(in_context), style)
