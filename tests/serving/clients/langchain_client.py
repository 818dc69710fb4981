"""LangChain's chat model: plain, streamed, in batches, with tools, as a record. Run by test_stock_clients.py."""

from __future__ import annotations

import sys
from typing import Any

from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

url = sys.argv[1]
QUESTION = "Name three rivers."


class Found(BaseModel):
    """What was found."""

    text: str


@tool
def look_up(text: str) -> str:
    """Look something up."""
    return f"found {text}"


def model(name: str = "aft", **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", model=name, api_key="none", max_retries=0, stream_usage=True, **settings)


chat = model(seed=5)
plain = chat.invoke(QUESTION)
assert plain.content, plain
assert plain.response_metadata["finish_reason"] == "stop", plain
assert plain.usage_metadata["output_tokens"] > len(plain.content.split()), "the drafts count"
chunks = list(chat.stream(QUESTION))
assert len(chunks) > 2 and "".join(str(chunk.content) for chunk in chunks) == plain.content
whole = sum(chunks[1:], chunks[0])
assert whole.usage_metadata == plain.usage_metadata, (whole, plain)
assert [len(str(reply.content)) > 0 for reply in chat.batch([QUESTION] * 5)] == [True] * 5

[call] = chat.bind_tools([look_up]).invoke(QUESTION).tool_calls
assert call["name"] == "look_up", call
asked = chat.bind_tools([look_up]).invoke(QUESTION)
again = chat.invoke([("user", QUESTION), asked, ToolMessage(look_up.invoke(call["args"]), tool_call_id=call["id"])])
assert again.content
assert chat.with_structured_output(Found, method="function_calling").invoke(QUESTION).text
single = model("aft@single", seed=5).invoke(QUESTION)
assert single.usage_metadata["output_tokens"] < plain.usage_metadata["output_tokens"]
aft = model(seed=5, extra_body={"aft": {"num_layers": 0}}).invoke(QUESTION)
assert aft.usage_metadata == single.usage_metadata

text = OpenAI(base_url=f"{url}/v1", model="aft", api_key="none", max_retries=0, max_tokens=64)
assert len(text.generate([QUESTION, "Name a lake."]).generations) == 2  # always sends a list
assert len(list(text.stream(QUESTION))) > 2
try:
    model(temperature=2.5).invoke(QUESTION)
except Exception as error:  # LangChain may wrap the client's own class
    assert "temperature" in str(error), error
else:
    raise AssertionError("a temperature of 2.5 was accepted")
