"""LiteLLM's SDK: plain, streamed, with tools, its error classes. Run by test_stock_clients.py."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import litellm

url = sys.argv[1]
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def asked(**settings: Any) -> dict[str, Any]:
    common = {"model": "openai/aft", "messages": MESSAGES, "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    return common | settings


plain = litellm.completion(**asked(seed=5))
assert plain.choices[0].message.content and plain.usage.completion_tokens > 8
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked(seed=5, stream=True))]
assert "".join(pieces) == plain.choices[0].message.content and len([piece for piece in pieces if piece]) > 1
single = litellm.completion(**asked(model="openai/aft@single", seed=5))
assert single.usage.completion_tokens < plain.usage.completion_tokens
several = asyncio.run(asyncio.wait_for(litellm.acompletion(**asked(n=2)), 60))
assert len(several.choices) == 2
called = litellm.completion(**asked(tools=[TOOL]))
assert called.choices[0].message.tool_calls[0].function.name == "look_up"
streamed = list(litellm.completion(**asked(tools=[TOOL], stream=True)))
built = litellm.stream_chunk_builder(streamed, messages=MESSAGES)
assert built.choices[0].message.tool_calls[0].function.name == "look_up"
text = litellm.text_completion(
    model="text-completion-openai/aft", prompt=["Hello", "Good day"], api_base=f"{url}/v1", api_key="none"
)
assert len(text.choices) == 2
for settings, expected in (
    ({"temperature": 3}, litellm.BadRequestError),
    ({"messages": [{"role": "user", "content": "word " * 18_000}]}, litellm.ContextWindowExceededError),
    ({"model": "openai/nosuch"}, litellm.NotFoundError),
):
    try:
        litellm.completion(**asked(**settings))
    except expected:
        continue
    raise AssertionError(f"{settings} did not raise {expected}")
