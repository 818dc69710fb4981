"""What a client's JSON schema may hold. Engines compile schemas, and some take minutes or never end.

The limits follow from what xgrammar 0.2 takes for each construct; under all of them a schema costs seconds at most.
What xgrammar would leave out of the grammar without a word is refused by name. Pure, and linear in the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

DEEPEST = 64
"""Most levels of objects and lists, of which each level of the described JSON takes two. Conversion is cubic in it."""
MOST_NODES = 1000
"""Most objects and lists."""
MOST_RANGES = 64
"""Most numbers with a smallest or largest value."""
MOST_LENGTHS = 8
"""Most different length limits of strings. Each one takes about a second to compile."""
LONGEST_PATTERN = 256
LARGEST_PATTERN = 512
"""Most characters of a pattern that is written out without repetition counts: `(ab){1,100}` has 200."""
MOST_PATTERN_CHARACTERS = 2048
"""Most of them in all patterns."""

RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LENGTHS = ("minLength", "maxLength")
NOT_FOLLOWED = {
    "number": ("multipleOf",),
    "integer": ("multipleOf",),
    "array": ("uniqueItems", "contains", "minContains", "maxContains"),
    "object": ("patternProperties", "propertyNames"),
}
"""Keywords, by type, that no grammar expresses (`has_xgrammar_unsupported_json_features` of vLLM 0.29)."""
IGNORED = ("allOf", "not", "if", "dependentRequired", "dependentSchemas")
"""Keywords that xgrammar leaves out; an `allOf` of one schema it follows."""
NAMES = ("properties", "$defs", "definitions", "patternProperties")
"""Keywords whose keys are names, not keywords."""
DATA = ("enum", "const", "default", "examples")
"""Keywords whose values are no schemas."""
FORMATS = (
    "email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference",
    "uri-template", "json-pointer", "relative-json-pointer",
)  # fmt: skip


def why_not_followed(schema: Mapping[str, Any], *, is_strict: bool = True) -> str | None:
    """Return why no engine is asked to follow a schema, as the end of a sentence; None for one that is fine.

    Without `is_strict` only costs count: models read the schemas of tools, and grammars follow what they can of them.
    """
    num_nodes = num_ranges = num_characters = 0
    lengths = set[tuple[Any, ...]]()
    for node, depth, is_schema in _nodes(schema):
        num_nodes += 1
        if depth > DEEPEST:
            return f"is nested more than {DEEPEST} levels deep"
        if num_nodes > MOST_NODES:
            return f"has more than {MOST_NODES} objects and lists"
        if not is_schema:
            continue
        for keyword in IGNORED if is_strict else ():
            is_one = isinstance(node.get(keyword), list) and len(node[keyword]) == 1
            if keyword in node and not (keyword == "allOf" and is_one):
                return f"uses {keyword}, which no engine here can follow"
        pattern, kind, format_ = node.get("pattern"), node.get("type"), node.get("format")
        for keyword in NOT_FOLLOWED.get(kind, ()) if is_strict and isinstance(kind, str) else ():
            if keyword in node:
                return f"uses {keyword}, which no engine here can follow"
        if is_strict and kind == "string" and isinstance(format_, str) and format_ not in FORMATS:
            return f"uses the format '{format_[:40]}'; those that engines can follow are {', '.join(FORMATS)}"
        reference = node.get("$ref")
        if is_strict and isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
            return "refers ($ref) to something outside of itself"
        has_length = any(isinstance(node.get(key), int) for key in LENGTHS)
        if has_length:
            lengths.add(tuple(node.get(key) for key in LENGTHS if isinstance(node.get(key), int)))
            if is_strict and kind == "string" and (isinstance(pattern, str) or isinstance(format_, str)):
                return "limits the length of a string that also has a pattern or a format; say it in the pattern"
        num_ranges += any(isinstance(node.get(key), int | float) for key in RANGES)
        if isinstance(pattern, str):
            if len(pattern) > LONGEST_PATTERN:
                return f"has a pattern longer than {LONGEST_PATTERN} characters"
            if is_strict and re.search(r"\(\?(?!:)", pattern):
                return "has a pattern with (?, of which engines know only groups that are not captured, (?:...)"
            size = written_out(pattern)
            num_characters += size
            if size > LARGEST_PATTERN:
                return f"has a pattern of more than {LARGEST_PATTERN} characters when its repetitions are written out"
    if num_characters > MOST_PATTERN_CHARACTERS:
        return f"has patterns of more than {MOST_PATTERN_CHARACTERS} characters when repetitions are written out"
    if num_ranges > MOST_RANGES:
        return f"has more than {MOST_RANGES} numbers with a smallest or largest value"
    if len(lengths) > MOST_LENGTHS:
        return f"has more than {MOST_LENGTHS} different length limits of strings"
    return None


def _nodes(schema: Any) -> Iterator[tuple[Any, int, bool]]:
    """Yield every object and list with its depth, and whether it is a schema, without recursion."""
    waiting = [(schema, 1, True)]
    while waiting:
        node, depth, is_schema = waiting.pop()
        if isinstance(node, list):
            yield node, depth, False
            waiting += [(part, depth + 1, is_schema) for part in node]
        elif isinstance(node, Mapping):
            yield node, depth, is_schema
            for key, part in node.items():
                if is_schema and key in NAMES and isinstance(part, Mapping):
                    yield part, depth + 1, False
                    waiting += [(inner, depth + 2, True) for inner in part.values()]
                else:
                    waiting.append((part, depth + 1, is_schema and key not in DATA))


PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d*)(?:,(\d*))?\}|.", re.DOTALL)
"""The pieces of a regular expression: an escape, a class, a repetition count or one character."""


def written_out(pattern: str) -> int:
    """Return how many characters a regular expression has when its repetition counts are written out."""
    groups = [0]
    last = 0
    """Characters of the piece, or of the group, that a count would repeat."""
    for piece in PIECES.finditer(pattern):
        text = piece[0]
        if text == "(":
            groups.append(0)
            last = 0
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif piece[1] is not None:
            times = max(1, *(int(number[:9] or 0) for number in (piece[1], piece[2] or "")))
            groups[-1] += last * (times - 1)
            last *= times
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)
