"""A JSON schema as a grammar: made once, away from the event loop, in limited time. The conversion is xgrammar's.

vLLM by itself converts a schema on its event loop, again for every sample, and its grammars allow endless white space,
in which small models lose themselves. What a schema may hold at all, `serving.json_schema` checks before.
"""

from __future__ import annotations

import asyncio
import codecs
import importlib
import random
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

from aft_ray.errors import InvalidSchema

MOST_WHITE_SPACE = 8
"""Most white space between two elements of a JSON text: enough for a line break and an indentation."""
CONVERT_S = 10.0
"""Longest time that the conversion of a schema may take."""


async def grammar_of(schema: str) -> str:
    """Return the grammar of a JSON schema in xgrammar's EBNF. Raises InvalidSchema for one that has none."""
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(_converters(), importlib.import_module, "xgrammar")  # which takes seconds, once
    converting = loop.run_in_executor(_converters(), converted, schema)
    try:
        async with asyncio.timeout(CONVERT_S):
            return await converting
    except TimeoutError:
        raise InvalidSchema(f"response_format: the schema could not be converted in {CONVERT_S:g} s") from None


@cache
def _converters() -> ThreadPoolExecutor:
    """Return threads of their own, so that costly schemas delay nothing but other schemas."""
    return ThreadPoolExecutor(2, thread_name_prefix="schemas")


@lru_cache(maxsize=256)
def converted(schema: str) -> str:
    """Return the grammar of a JSON schema. Clients tend to send the same few schemas."""
    import xgrammar

    try:
        return str(xgrammar.Grammar.from_json_schema(schema, max_whitespace_cnt=MOST_WHITE_SPACE))
    except (RuntimeError, ValueError) as error:
        reason = re.sub(r"^\[[^\]]*\] \S+:\d+: ", "", str(error).strip())  # where in xgrammar's source it was raised
        raise InvalidSchema(f"response_format: no engine can follow this schema: {reason[:300]}") from None


BYTES = [bytes([byte]) for byte in range(256)]
END = len(BYTES)


def sentence(grammar: str, seed: int, max_pieces: int) -> list[str]:
    """Return a text that follows a grammar, in pieces of a character, cut off after `max_pieces`.

    A stand-in for a model: every byte is a token, the choice among those allowed is random, and brackets and quotes
    tend to be closed.
    """
    import xgrammar

    matcher = xgrammar.GrammarMatcher(_byte_compiler().compile_grammar(xgrammar.Grammar.from_ebnf(grammar)))
    allowed = xgrammar.allocate_token_bitmask(1, END + 1)
    # A grammar's class of characters may allow bytes that are no UTF-8. They become U+FFFD, as in an engine's own text.
    rng, decoder = random.Random(seed), codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces: list[str] = []
    while len(pieces) < max_pieces:
        matcher.fill_next_token_bitmask(allowed)
        words = [int(word) for word in allowed[0].tolist()]
        tokens = [token for token in range(END + 1) if words[token // 32] >> token % 32 & 1]
        if not tokens:
            break  # a schema that contradicts itself
        closing = [token for token in tokens if token == END or token in b'"}]']
        token = rng.choice(closing if closing and rng.random() < 0.5 else tokens)
        if token == END or not matcher.accept_token(token):
            break
        if piece := decoder.decode(BYTES[token]):
            pieces.append(piece)
    return pieces


@cache
def _byte_compiler() -> Any:
    import xgrammar

    info = xgrammar.TokenizerInfo([*BYTES, b"</s>"], xgrammar.VocabType.RAW, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1)
