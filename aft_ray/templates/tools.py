"""Tools described in words, for answers that are drafts: they cannot call a tool, but must know which there are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from aft_ray.records import Message

DESCRIPTION = """\
These tools exist. They cannot be called in this answer. Where the question needs one, say which tool to call and with \
which arguments.

"""


def describing_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Return the conversation with the tools described in its system message."""
    functions = (json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    text = DESCRIPTION + "\n".join(functions)
    if messages and messages[0]["role"] == "system":
        first = messages[0].copy()
        first["content"] = f"{first['content']}\n\n{text}"
        return (first, *messages[1:])
    return (Message(role="system", content=text), *messages)
