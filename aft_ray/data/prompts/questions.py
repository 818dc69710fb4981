"""Reads the question of a row: the prompt's column, and every column beside it that changes what is asked.

    column                                  beside a text                                beside a conversation
    system, system_prompt, system_message   the system message                           the same
    history                                 earlier turns, [question, answer] each       the same
    input, context                          below the question                           not read
    choices, options                        below the question, one a line: "A. Paris"   not read
    instances (Self-Instruct)               the input of the only one                    not read
    tools, functions, images, audio, ...    refused unless empty                         the same

`prompts.ignore_columns` names columns that only look like these. They are kept as metadata.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aft_ray.data.prompts.conversations import kind_of, parsed, read_conversation, user_text
from aft_ray.errors import InputError
from aft_ray.records import Message

PROMPT_COLUMNS = ("messages", "conversations", "conversation", "prompt", "query", "instruction", "question")
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")
BELOW = ("input", "context")
OPTIONS = ("choices", "options")
REFUSED = ("tools", "functions", "images", "image", "audio", "audios", "video", "videos")
LETTERED = re.compile(r"\(?[A-Za-z0-9][).:]")


class Question(NamedTuple):
    """What a row asks."""

    messages: list[Message]
    """The conversation; it may end with an answer."""
    used: frozenset[str]
    """The columns that it was read from."""


def read_question(row: Mapping[str, Any], column: str, ignored: Sequence[str], place: str) -> Question:
    """Return the conversation that the columns of a row make, which has no null values.

    Raises InputError, which begins with `place`, for a column that cannot be read and would change the question.
    """
    beside = {key: value for key, value in row.items() if key not in ignored and key != column}
    for name in REFUSED:
        if beside.get(name) not in (None, "", [], {}, "[]", "{}"):
            raise InputError(f"{place}: column '{name}' changes the question, and only text is read. {_ignore(name)}")
    used = {column}
    messages = read_conversation(row[column], f"{place}: column '{column}'")
    if messages is None:
        text, more = _with_what_is_below(row[column], beside, column, place)
        used |= more
        messages = [user_text(text, f"{place}: column '{column}'")]
    messages = [*_history(beside, place), *messages]
    system = _system(beside, place)
    if system is not None and messages[0]["role"] == "system" and messages[0]["content"].strip() != system.strip():
        raise InputError(f"{place}: the messages begin with another system message than the row's system column")
    if system is not None and messages[0]["role"] != "system":
        messages = [Message(role="system", content=system), *messages]
    return Question(messages, frozenset(used | {"history", *SYSTEM_COLUMNS} & beside.keys()))


def _ignore(name: str) -> str:
    return f"If it is no part of the question, set prompts.ignore_columns: [{name}]"


def _system(row: Mapping[str, Any], place: str) -> str | None:
    """Return the system message of a row's columns, or None if it is empty."""
    texts = {}
    for name in SYSTEM_COLUMNS:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place}: column '{name}': expected text, found {kind_of(value)}. {_ignore(name)}")
        if value and value.strip():
            texts[name] = value
    if len(set(texts.values())) > 1:
        raise InputError(f"{place}: the columns {', '.join(texts)} differ; name one of them in prompts.ignore_columns")
    return next(iter(texts.values()), None)


def _history(row: Mapping[str, Any], place: str) -> list[Message]:
    """Return the earlier turns: a list of [question, answer], or of messages."""
    value, place = parsed(row.get("history")), f"{place}: column 'history'"
    if value in (None, "", []):
        return []
    if not isinstance(value, list):
        raise InputError(
            f"{place}: expected a list of [question, answer], found {kind_of(value)}. {_ignore('history')}"
        )
    if all(isinstance(item, Mapping) for item in value):
        return read_conversation(value, place) or []
    turns: list[Message] = []
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"{place}, turn {number}: expected [question, answer], found {kind_of(pair)}")
        turns.append(user_text(pair[0], f"{place}, turn {number}"))
        turns.append(Message(role="assistant", content=user_text(pair[1], f"{place}, turn {number}")["content"]))
    return turns


def _with_what_is_below(text: str, row: Mapping[str, Any], column: str, place: str) -> tuple[str, set[str]]:
    parts, used = [text], set()
    for name in BELOW:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{place}: column '{name}': expected text, found {kind_of(value)}. {_ignore(name)}")
        parts += [value] if value and value.strip() and text.strip() else []
        used |= {name} if value is not None else set()
    if column == "instruction" and row.get("instances"):
        parts += _instance(row["instances"], place)
    for name in OPTIONS:
        if row.get(name):
            parts += _options(row[name], name, text, place)
            used.add(name)
    return "\n\n".join(parts), used


def _instance(instances: Any, place: str) -> list[str]:
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], Mapping):
        raise InputError(
            f"{place}: column 'instances': expected a list of one, found {kind_of(instances)} of another form"
        )
    text = instances[0].get("input")
    return [text] if isinstance(text, str) and text.strip() else []


def _options(value: Any, name: str, question: str, place: str) -> list[str]:
    """Return the options as a text of one line each, or nothing if the question itself lists them."""
    value = parsed(value)
    labels: Sequence[str] = string.ascii_uppercase
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels, value = value.get("label") or labels, value["text"]
    if not isinstance(value, list) or not value or not all(isinstance(option, str) for option in value):
        raise InputError(f"{place}: column '{name}': expected a list of texts, found {kind_of(value)}. {_ignore(name)}")
    if len(value) > len(labels):
        raise InputError(f"{place}: column '{name}': {len(value)} options and {len(labels)} labels")
    if all(option in question for option in value):
        return []
    if all(LETTERED.match(option.strip()) for option in value):
        return ["\n".join(option.strip() for option in value)]
    return ["\n".join(f"{label}. {option}" for label, option in zip(labels, value, strict=False))]
