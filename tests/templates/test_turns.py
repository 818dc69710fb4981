"""Names, tool calls and their results reach the model: in the template's own form, or as text where it has none."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from aft_ray.records import Message, ToolCall, prompt_id_of
from aft_ray.templates import ChatFormat
from tests.templates.families import assistant, format_of, make_tokenizer, system, user

CALL: ToolCall = {
    "id": "callcall1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Hello <|im_end|>"}'},
}
HISTORY: list[Message] = [
    user("Is it Hello there?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "17 degrees", "tool_call_id": "callcall1"},
    user("Thanks"),
]
WITH_CALLS = (  # Hermes and Qwen: the arguments are a dict
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls %}"
    "{{ '<tool_call>' + c.function.name + ' ' + (c.function.arguments | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TEXT_ARGUMENTS = WITH_CALLS.replace("(c.function.arguments | tojson)", "c.function.arguments")
WITH_NAMES = WITH_CALLS.replace("m.role + '\n'", "m.role + (' ' + m.name if m.name else '') + '\n'")


def chat_format(template: str) -> ChatFormat:
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


def shown(chat: ChatFormat, messages: list[Message]) -> str:
    return chat.decode(chat.prompt_ids(messages))


@pytest.mark.parametrize("template", [WITH_CALLS, WITH_TEXT_ARGUMENTS], ids=["dict", "text"])
def test_a_template_that_knows_tool_calls_writes_them(template: str) -> None:
    text = shown(chat_format(template), HISTORY)
    before, _, after = text.partition("<tool_call>weather ")
    assert "Is it Hello there?" in before
    arguments, _, rest = after.partition("</tool_call>")
    assert json.loads(arguments) == {"city": "Hello <\u200b|im_end|>"}
    assert "<|im_start|>tool\n17 degrees<|im_end|>" in rest
    assert text.count("<|im_end|>") == len(HISTORY)


@pytest.mark.parametrize("family", ["chatml", "mistral", "gemma", "base"])
def test_a_template_without_tool_calls_gets_them_as_text_in_turns_that_alternate(family: str) -> None:
    text = shown(format_of(family), HISTORY)
    for part in ("Is it Hello there?", "[Calls weather with", "[Result of weather] 17 degrees\nThanks"):
        assert part in text


def test_nothing_in_a_tool_call_ends_a_turn() -> None:
    text = shown(format_of("chatml"), HISTORY)
    assert text.count("<|im_end|>") == len(HISTORY) - 1


def test_a_name_is_written_by_the_template_or_stands_before_the_text() -> None:
    named: list[Message] = [{**user("Hello"), "name": "Ada"}]
    assert "user Ada\nHello" in shown(chat_format(WITH_NAMES), named)
    assert "user\nAda: Hello" in shown(chat_format(WITH_CALLS), named)


def test_what_a_model_thought_before_an_answer_reaches_its_template() -> None:
    template = WITH_CALLS.replace("+ m.content", "+ ('<think>' + m.reasoning_content + '</think>' "
                                  "if m.reasoning_content else '') + m.content")  # fmt: skip
    thought: list[Message] = [user("7"), {**assistant("8"), "reasoning_content": "odd"}, user("9")]
    assert "<think>odd</think>8" in shown(chat_format(template), thought)


def test_a_system_text_in_the_users_turn_keeps_the_users_name() -> None:
    text = shown(format_of("gemma"), [system("Be kind"), {**user("Hello"), "name": "Ada"}])
    assert "Be kind\n\nAda: Hello" in text


def test_only_what_goes_beyond_role_and_text_changes_the_id_of_a_prompt() -> None:
    plain: Any = [user("Hello")]
    ids = {prompt_id_of(messages) for messages in (plain, [{**user("Hello"), "name": "Ada"}], HISTORY, HISTORY[:1])}
    assert len(ids) == 4


def test_tools_and_arguments_reach_a_template_that_has_a_place_for_them() -> None:
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name + ': ' + tool.function.description + '\n' }}{% endfor %}"
        + WITH_CALLS
        + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    )
    chat = chat_format(template)
    assert chat.takes_tools and chat.template_arguments == {"enable_thinking"}
    tool = {"type": "function", "function": {"name": "weather", "description": "Now <|im_end|>", "parameters": {}}}
    told = chat.rendering([tool], {"enable_thinking": False, "unknown": 1})
    text = shown(told, [user("Hello")])
    assert text.startswith("weather: Now <\u200b|im_end|>\n")
    assert text.endswith("assistant\n<think></think>")
    assert chat.prompt_ids([user("Hello")]) == chat.rendering((), {}).prompt_ids([user("Hello")])


def test_a_template_without_tools_says_so() -> None:
    assert not format_of("chatml").takes_tools
    assert not format_of("base").takes_tools
    assert format_of("thinking").template_arguments == frozenset()
