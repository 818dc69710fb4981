"""The format that an engine needs, for data, serving and evaluation alike."""

from __future__ import annotations

from aft_ray.engines.base import EngineInfo
from aft_ray.models import resolve_tokenizer
from aft_ray.templates.chat import ChatFormat, Style
from aft_ray.templates.format import MessagesFormat, PromptFormat
from aft_ray.templates.in_context import InContextPrompt


def load_format(info: EngineInfo, style: Style = "chat", in_context: str = "default") -> PromptFormat:
    """Return the `ChatFormat` of an engine's tokenizer, or `MessagesFormat` for an engine without one.

    The tokenizer's reference (hub id, folder, URL, packaged model) is resolved on the node that calls. Raises
    ConfigError for style `chat` where neither the engine nor its tokenizer has a chat template.
    """
    if info.tokenizer is None:
        return MessagesFormat()
    return ChatFormat.load(
        resolve_tokenizer(info.tokenizer),
        InContextPrompt.load(in_context),
        style,
        trust_remote_code=info.trust_remote_code,
        chat_template=info.chat_template,
    )
