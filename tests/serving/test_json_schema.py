"""JSON schemas of clients: what is refused before an engine sees it, and what a grammar lets an engine write."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.grammar import MOST_WHITE_SPACE, converted, grammar_of, sentence
from aft_ray.engines.json_schema import why_not_followed, written_out
from aft_ray.engines.scripted import ScriptedEngine
from tests.serving.test_ingress import post, service_over

RIVERS = {
    "type": "object",
    "properties": {
        "rivers": {"type": "array", "items": {"$ref": "#/$defs/river"}, "maxItems": 3},
        "since": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
    },
    "required": ["rivers", "since"],
    "additionalProperties": False,
    "$defs": {"river": {"type": "object", "properties": {"km": {"type": "integer", "minimum": 0, "maximum": 9999}}}},
}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def properties(number: int, **schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": dict(schema) for i in range(number)}}


def lengths(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 100 + i} for i in range(number)}}


def service(**engine: Any) -> Any:
    return service_over(ScriptedEngine(ScriptedEngineConfig(follows_json_schema=True, **engine)))


def ask(schema: Any, served: Any = None, **body: Any) -> Any:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return post(served or service(), response_format=asked, **body)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (nested(300), "nested more than 64 levels"),
        (properties(1100), "more than 1000 objects"),
        (properties(300, type="integer", minimum=-987654321, maximum=987654321), "more than 64 numbers"),
        (lengths(30), "more than 8 different length limits"),
        ({"type": "string", "pattern": "^(a|b|c){1,20000}$"}, "repetitions are written out"),
        ({"type": "string", "pattern": "^(([^a]*b){1,64}c){1,64}$"}, "repetitions are written out"),
        ({"type": "string", "pattern": "a{5,99999999999999}"}, "repetitions are written out"),
        ({"type": "string", "pattern": "a" * 257}, "longer than 256 characters"),
        (properties(9, type="string", pattern="^[a-z]{1,256}$"), "repetitions are written out"),
        ({"type": "string", "pattern": "^(?=.*a).*$"}, "(?, of which"),
        ({"type": "array", "items": {}, "uniqueItems": True}, "uniqueItems"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "uses allOf"),
        ({"type": "object", "properties": {"a": {"not": {"type": "null"}}}}, "uses not"),
        ({"$ref": "https://example.org/schema"}, "outside of itself"),
        ({"type": "string", "format": "credit-card"}, "format 'credit-card'"),
        ({"type": "string", "format": "email", "maxLength": 5}, "limits the length"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_costly_schema_is_refused_before_an_engine_sees_it(schema: dict[str, Any], reason: str) -> None:
    served = service()
    response = ask(schema, served)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "response_format", "invalid_value")
    assert reason in error["message"]
    assert served.answers.aggregator.engine.requests == []


@pytest.mark.parametrize(
    "schema",
    [
        nested(31),
        properties(900),
        properties(60, type="number", minimum=0.5),
        lengths(8),
        {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
        RIVERS,
        {"type": "object", "properties": {"not": {"allOf": [{"enum": [{"if": 1, "pattern": "(?="}]}]}}},
    ],
    ids=["deep", "wide", "ranges", "lengths", "uuid", "rivers", "keywords as names and data"],
)
def test_what_is_within_the_limits_is_converted_in_time_while_the_loop_goes_on(schema: dict[str, Any]) -> None:
    assert why_not_followed(schema) is None

    async def run() -> float:
        await grammar_of('{"type": "null"}')  # imports xgrammar
        converting = asyncio.create_task(grammar_of(json.dumps(schema)))
        longest = 0.0
        while not converting.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
        assert "root ::=" in await converting
        return longest

    assert asyncio.run(run()) < 2


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("(ab){1,100}", 200), ("[0-9]{4}-[0-9]{2}", 7), (r"a\{3}", 4), (r"[^\]a]{3}", 3), ("((a|b){3}c){4}", 40)],
)
def test_a_pattern_is_measured_as_if_its_repetitions_were_written_out(pattern: str, size: int) -> None:
    assert written_out(pattern) == size


def test_an_engine_that_follows_schemas_writes_what_was_asked_for() -> None:
    response = ask(RIVERS, max_tokens=500)
    answer = json.loads(response.json()["choices"][0]["message"]["content"])
    assert set(answer) == {"rivers", "since"} and len(answer["rivers"]) <= 3


@pytest.mark.parametrize(
    "schema",
    [{"type": "nonsense"}, {"type": "string", "pattern": r"\p{L}"}, {"enum": []}],
)
def test_a_schema_that_has_no_grammar_names_its_parameter_and_no_file(schema: dict[str, Any]) -> None:
    response = ask(schema)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "response_format", "invalid_value")
    assert ".cc" not in error["message"]


@pytest.mark.parametrize("schema", ['{"type": "object"}', json.dumps(RIVERS)], ids=["any object", "a schema"])
def test_white_space_between_two_elements_ends(schema: str) -> None:
    import xgrammar

    grammar = xgrammar.Grammar.from_ebnf(asyncio.run(grammar_of(schema)))
    info = xgrammar.TokenizerInfo(["{", " ", "</s>"], stop_token_ids=[2])
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info, max_threads=1).compile_grammar(grammar))
    assert matcher.accept_string("{" + " " * MOST_WHITE_SPACE)
    assert not matcher.accept_string(" ")


def test_json_that_was_cut_off_says_so() -> None:
    body = post(service(), response_format={"type": "json_object"}, max_tokens=1).json()
    assert body["choices"][0]["finish_reason"] == "length"


def test_a_text_of_bytes_that_are_no_utf_8_is_text_all_the_same() -> None:
    """A grammar of any string allows the bytes of a lone surrogate, which seed 87 draws."""
    assert "\ufffd" in "".join(sentence(converted('{"type": "string"}'), 87, 4))
