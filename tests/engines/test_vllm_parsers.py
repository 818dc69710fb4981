"""vLLM's parsers, by name, over texts as models write them: thinking and tool calls, whole and token by token."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import pytest

from aft_ray.config import VllmEngineConfig
from aft_ray.engines.base import GenerateRequest, Sampling, TokenDelta, ToolUse, whole_calls
from tests.templates.families import make_tokenizer

pytestmark = [
    pytest.mark.soak,  # importing vLLM takes many seconds
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
THOUGHT = "<think>\nI need the tool.\n</think>\n\n"


def read(text: str, prompt: str = "<|im_start|>assistant\n", **asked: Any) -> tuple[str, str, list[tuple[Any, ...]]]:
    """Return answer, thinking and calls of a text that comes token by token."""
    from aft_ray.engines.vllm_parsers import VllmParsers

    tokenizer = make_tokenizer("thinking")
    config = SimpleNamespace(model="a-model", hf_config=SimpleNamespace(model_type="qwen2"))
    parsers = VllmParsers(
        reasoning_parser="deepseek_r1", tool_parser="hermes", tokenizer=tokenizer, model_config=config
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    request = GenerateRequest(
        request_id="r",
        prompt_ids=(*tokenizer("earlier</think>")["input_ids"], end, *tokenizer(prompt)["input_ids"]),
        messages=({"role": "user", "content": "Weather?"},),
        sampling=Sampling(),
        seeds=(0,),
        stop_ids=(end,),
        **asked,
    )
    found = parsers.asked(request)
    assert found is not None
    reader = found.reader()
    ids = tokenizer(text)["input_ids"]
    deltas = []
    for number, index in enumerate(ids):
        delta = TokenDelta(index=0, text=tokenizer.decode([index]), num_tokens=1)
        deltas.append(reader.read(delta, [index], is_last=number == len(ids) - 1))
    calls = whole_calls(piece for delta in deltas for piece in delta.tool_calls)
    return (
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas).strip(),
        [(call.name, json.loads(call.arguments)) for call in calls],
    )


def tool_use(**settings: Any) -> ToolUse:
    return ToolUse(tools=(WEATHER,), **settings)


def test_thinking_is_told_from_the_answer() -> None:
    assert read(f"{THOUGHT}It is warm.") == ("It is warm.", "I need the tool.", [])


def test_thinking_that_the_prompt_opened_is_told_too() -> None:
    found = read("I need the tool.\n</think>\n\nIt is warm.", prompt="<|im_start|>assistant\n<think>\n")
    assert found == ("It is warm.", "I need the tool.", [])


def test_thinking_that_the_prompt_closed_does_not_come() -> None:
    found = read("It is warm.", prompt="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert found == ("It is warm.", "", [])


def test_a_call_is_read_after_the_thinking() -> None:
    text, thinking, calls = read(THOUGHT + CALL, tool_use=tool_use())
    assert (text.strip(), thinking, calls) == ("", "I need the tool.", [("weather", {"city": "Rome"})])


def test_of_calls_that_must_not_be_parallel_the_first_is_kept() -> None:
    both = f"{THOUGHT}{CALL}\n{CALL}"
    assert len(read(both, tool_use=tool_use())[2]) == 2
    assert len(read(both, tool_use=tool_use(is_parallel=False))[2]) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_is_written_in_a_grammar(choice: Any) -> None:
    from aft_ray.engines.vllm_parsers import VllmParsers

    config = SimpleNamespace(model="a-model", hf_config=SimpleNamespace(model_type="qwen2"))
    parsers = VllmParsers(
        reasoning_parser=None, tool_parser="hermes", tokenizer=make_tokenizer("thinking"), model_config=config
    )
    request = GenerateRequest(
        request_id="r", prompt_ids=(1,), messages=(), sampling=Sampling(), seeds=(0,), tool_use=tool_use(choice=choice)
    )
    asked = parsers.asked(request)
    assert asked is not None
    grammar = asked.structured_outputs.structural_tag or json.dumps(asked.structured_outputs.json)
    assert "weather" in grammar


def test_a_parser_that_vllm_does_not_have_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="no such parser; did you mean 'hermes'"):
        VllmEngineConfig(model="m", tool_parser="hermse")
    with pytest.raises(ValueError, match="no such parser"):
        VllmEngineConfig(model="m", reasoning_parser="hermes")
    assert VllmEngineConfig(model="m").identity() == VllmEngineConfig(model="m", tool_parser="hermes").identity()
    assert "reasoning_parser" not in VllmEngineConfig(model="m").identity()
