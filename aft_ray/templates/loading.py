"""The format an engine needs, from what it tells of itself: one place for data, serving and evaluation."""

from __future__ import annotations

from aft_ray.templates.chat import ChatFormat, Style
from aft_ray.templates.format import MessagesFormat, PromptFormat
from aft_ray.templates.in_context import InContextPrompt


def load_format(tokenizer: str | None, in_context: str = "default", style: Style = "auto") -> PromptFormat:
    """`ChatFormat` of a tokenizer's folder or hub id; `MessagesFormat` for an engine without one (None)."""
    if tokenizer is None:
        return MessagesFormat()
    return ChatFormat.load(tokenizer, InContextPrompt.load(in_context), style)
