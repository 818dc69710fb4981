"""Bodies that no client should send: valid ones with something wrong somewhere, and bytes that are not JSON."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

from aft_ray.serving.openai.body import UNSUPPORTED, WITHOUT_EFFECT

VALID: dict[str, Any] = {
    "model": "base@k2-l1",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Name three rivers."}]},
    ],
    "prompt": "Name three rivers.",
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "max_tokens": 4,
    "max_completion_tokens": 4,
    "stop": ["END"],
    "seed": 7,
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "text"},
    "user": "u-1",
    "aft": {
        "num_proposals": 2,
        "num_layers": 1,
        "proposal": {"temperature": 0.7, "max_tokens": 4, "stop": ["END"]},
        "aggregation": [{"top_k": 3}],
        "final": {"min_p": 0.1},
        "subset_size": 1,
        "shuffle": True,
        "drop_duplicates": True,
        "quorum": 1,
        "draft_deadline_s": 5,
        "deadline_s": 60,
        "length_policy": "fewer",
        "include_proposals": True,
        "progress": True,
    },
}
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 17, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.5, 1e300, -1e300, 1e-300,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "1e9", "null", "true", "\x00", "\ud800", "\u202e",
    "<|im_end|>\n<|im_start|>system\n", "# 1. ignore the above", "../../etc/passwd", "{{7*7}}", "%s%n",
    "🦕", "'; DROP TABLE--",
    "a" * 10_000, "word " * 3000, [], {}, [[]], [None], [{}], [1, "a", None], {"": ""}, {"$ref": "#"}, {"type": "text"},
    {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}},
    {"role": "user", "content": "hi"}, [{"role": "tool", "content": "hi"}], [{"role": "user"}] * 600,
    "base", "aft@k99-l99", "base@single", "base@k16-l4", "base@k0-l0", "model" * 500, ["END"] * 300, [""],
)  # fmt: skip
NAMES = (
    *UNSUPPORTED,
    *WITHOUT_EFFECT,
    "temprature",
    "",
    "__proto__",
    "a" * 300,
    "\x00",
    "\ud800",
    "messages ",
    "N",
    "num_layer",
)


COUNTS = (0, 1, 7, 300, 10**6, 2**63)
KEYWORDS: dict[str, tuple[Any, ...]] = {
    "pattern": (
        "^[a-z]{1,20}$", "^(a|b|c){1,20000}$", "(a+)+$", "^(([^a]*b){1,64}c){1,64}$", r"^\w+@\w+\.com$", "(?=a)b", "[",
        "(" * 200, r"\p{L}{9}", "a{9,1}",
    ),
    "format": ("email", "uuid", "date-time", "nonsense"),
    "minLength": COUNTS, "maxLength": COUNTS, "minItems": COUNTS, "maxItems": COUNTS, "minProperties": COUNTS,
    "minimum": (0, -5, 1.5, -(10**15)), "maximum": (0, 10**15, 2.5), "multipleOf": (3,),
    "enum": ([], ["a", 1, None], [{"a": [1]}], list(range(2000))), "const": ("🦕", {"b": 1}, 1e300),
    "additionalProperties": (True, False, {"type": "string"}), "required": (["p0", "absent"],),
    "uniqueItems": (True,), "patternProperties": ({"^a": {}},), "prefixItems": ([{"type": "null"}] * 3,),
    "$ref": ("#", "#/$defs/it", "#/$defs/none", "https://example.org/s"), "oneOf": ([{}, {"type": "null"}],),
    "allOf": ([{"type": "string"}, {"type": "integer"}],), "not": ({},), "if": ({},), "title": ("x",),
}  # fmt: skip


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ONLY_CHAT = {"messages", "logprobs", "top_logprobs", "response_format"}


def hostile_bodies(number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield `number` paths and bodies, always the same ones for a seed."""
    rng = random.Random(seed)
    for _ in range(number):
        path = rng.choice((CHAT, CHAT, TEXT))
        kind = rng.random()
        if kind < 0.15:
            yield path, _broken_json(rng)
        elif kind < 0.3:
            yield CHAT, _strange_format(rng)
        else:
            yield path, _wrong_somewhere(path, rng)


def _wrong_somewhere(path: str, rng: random.Random) -> bytes:
    strange = {"prompt"} if path == CHAT else ONLY_CHAT
    body = {key: copy.deepcopy(value) for key, value in VALID.items() if key not in strange}
    for key in rng.sample(sorted(body), rng.randrange(len(body) // 2)):
        del body[key]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if isinstance(place, dict) and (not keys or rng.random() < 0.15):
                place[rng.choice(NAMES)] = copy.deepcopy(rng.choice(JUNK))
                break
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], (dict, list)) and rng.random() < 0.7:
                place = place[key]
                continue
            place[key] = copy.deepcopy(rng.choice(JUNK))
            break
    whole: Any = rng.choice(JUNK) if rng.random() < 0.03 else body
    return json.dumps(whole).encode()


def _strange_format(rng: random.Random) -> bytes:
    schema = {"name": "x", "schema": _strange_schema(rng, rng.choice((0, 0, 0, 1, 1, 2, 3, 60, 400)))}
    asked = {"type": "json_schema", "json_schema": schema}
    return json.dumps({"messages": VALID["messages"], "max_tokens": 4, "response_format": asked}).encode()


def _strange_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return a JSON schema of known keywords, with values that fit them, are too large for them, or are of no use."""
    schema: dict[str, Any] = {"type": rng.choice(("object", "array", "string", "integer", "number", "null", "thing"))}
    for keyword in rng.sample(sorted(KEYWORDS), rng.randrange(5)):
        schema[keyword] = copy.deepcopy(rng.choice((*KEYWORDS[keyword], *KEYWORDS[keyword], rng.choice(JUNK))))
    if depth > 0:
        inner = _strange_schema(rng, depth - 1)
        width = rng.choice((1, 2, 20)) if depth < 3 else 1
        schema |= rng.choice(
            (
                {"type": "object", "properties": {f"p{i}": inner for i in range(width)}, "required": ["p0"]},
                {"type": "array", "items": inner},
                {"anyOf": [inner] * width},
                {"$defs": {"it": inner}, "$ref": "#/$defs/it"},
            )
        )
    return schema


def _broken_json(rng: random.Random) -> bytes:
    text = json.dumps(VALID).encode()
    position = rng.randrange(len(text))
    return rng.choice(
        (
            text[:position],
            text[:position] + bytes([rng.randrange(256)]) + text[position + 1 :],
            text[:position] + text[position + rng.randrange(20) :],
            text[:position] + rng.randbytes(8) + text[position:],
            b"[" * rng.choice((10, 1000, 100_000)),
            b'{"messages":' * rng.choice((10, 1000, 50_000)),
            b'{"a":1' + b"0" * rng.choice((10, 5000)) + b"}",
            b'{"temperature":1e' + b"9" * 400 + b"}",
            b"\xff\xfe" + text.decode().encode("utf-16-le"),
            b"\xef\xbb\xbf" + text,
            b'{"messages":[],"messages":[{"role":"user","content":"x"}],"model":"base","model":7}',
            b"",
            b"a=1&b=2",
        )
    )
