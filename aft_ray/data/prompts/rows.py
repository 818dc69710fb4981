"""Turns one raw row of a source into a row of `records.PROMPTS`, or raises InputError with the reason why it cannot.

The prompt is read from the column that the config names, or from the first of `messages`, `prompt`, `query`,
`instruction`, `question`. It is a text or a list of {role, content}; if an `instruction` has a text `input` beside it,
the input is appended. A row may also have a `prompt_id`, a `task`, a `reference`, and the answers that
`prompts.responses` describes. All other columns are kept in `metadata`.

A prompt with NUL, lone surrogates, control tokens of a chat format, or more than 500,000 characters is rejected, unless
`prompts.unusual_text` is keep. Then it is accepted unchanged, except that U+FFFD replaces lone surrogates, which cannot
be written as UTF-8. (The chat format breaks up control tokens when it tokenizes the text.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aft_ray.config import PromptsConfig
from aft_ray.data.constraints import parse_all
from aft_ray.data.prompts.responses import columns_of, excerpt, kind_of, layout_of, read_responses
from aft_ray.errors import InputError
from aft_ray.inference.answers import final_number
from aft_ray.records import Message, prompt_id_of
from aft_ray.templates.control import without_surrogates

PROMPT_COLUMNS = ("messages", "prompt", "query", "instruction", "question")
ROLES = ("system", "user", "assistant")
MOST_CHARACTERS = 500_000
"""Longest text that `prompts.unusual_text: reject` accepts; a longer one would fill any model's context window."""
CONTROL = re.compile(r"<\|[^\s|<>{}]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
"""Control tokens of the common chat formats, since prompts are read before the models that will see them are known."""


def to_prompt(raw: Any, config: PromptsConfig, place: str) -> tuple[dict[str, Any], bool]:
    """Return the row of `records.PROMPTS` without its `split`, and whether the source gave the `prompt_id`."""
    column, messages = conversation(raw, config.column, place)
    if messages[-1]["role"] != "user":
        raise InputError(
            f"{place}: column '{column}': the last turn is '{messages[-1]['role']}', expected 'user'. "
            "Remove the answer from the messages; to train on it, put it into the reference column"
        )
    if config.unusual_text == "reject":
        _reject_unusual(raw[column], column, place)
    row = {key: value for key, value in raw.items() if value is not None}
    layout = layout_of(config)
    used = {column, "prompt_id", "task", "metadata"} | columns_of(layout)
    used |= {"input"} if column == "instruction" else set()
    reference_column = config.reference_column or "reference"
    prompt = {
        "prompt_id": _prompt_id(row, messages, place),
        "messages": messages,
        "reference": _reference(raw, reference_column, config.reference_column is not None, place),
        "task": config.task or _task(row, place),
        "metadata": _metadata(row, used | {reference_column}),
        "responses": None if layout is None else read_responses(raw, layout, place),
    }
    _check_task(prompt, row, place)
    return prompt, "prompt_id" in row


def _reject_unusual(prompt: str | Sequence[Message], column: str, place: str) -> None:
    for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        if without_surrogates(text) != text:
            found = "a lone surrogate"
        elif "\0" in text:
            found = "NUL"
        elif len(text) > MOST_CHARACTERS:
            found = f"{len(text):,} characters"
        elif (control := CONTROL.search(text)) is not None:
            found = f"the control token {control.group()}"
        else:
            continue
        raise InputError(
            f"{place}: column '{column}': the text contains {found}; prompts.unusual_text: keep accepts it"
        )


def conversation(
    raw: Any, column: str | None, place: str, hint: str = "Name the right one in prompts.column"
) -> tuple[str, list[Message]]:
    """Return the name of the column that holds the prompt (`column`, or the first known name), and the prompt.

    `hint` ends the error message for a row without such a column: it says what to do.
    """
    if isinstance(raw, InputError):
        raise raw
    if not isinstance(raw, Mapping):
        raise InputError(f"{place}: expected an object with a prompt, found {kind_of(raw)}")
    row = {key: value for key, value in raw.items() if value is not None}
    found = _prompt_column(row, column, place, hint)
    return found, _messages(row, found, place)


def _prompt_column(row: Mapping[str, Any], wanted: str | None, place: str, hint: str) -> str:
    columns = (wanted,) if wanted else PROMPT_COLUMNS
    for column in columns:
        if column in row:
            return column
    expected = f"column '{wanted}' (prompts.column)" if wanted else f"one of {', '.join(PROMPT_COLUMNS)}"
    raise InputError(
        f"{place}: no prompt; expected {expected}, found columns: {', '.join(map(str, row)) or 'none'}. {hint}"
    )


def _messages(row: Mapping[str, Any], column: str, place: str) -> list[Message]:
    value = row[column]
    if isinstance(value, str):
        extra = row.get("input", "") if column == "instruction" else ""
        if not isinstance(extra, str):
            raise InputError(f"{place}: column 'input': expected text, found {kind_of(extra)}")
        value = [{"role": "user", "content": f"{value}\n\n{extra}" if extra.strip() and value.strip() else value}]
    if not isinstance(value, list):
        raise InputError(f"{place}: column '{column}': expected text or a list of messages, found {kind_of(value)}")
    if not value:
        raise InputError(f"{place}: column '{column}': the list is empty; expected at least one message")
    return [_message(item, f"{place}: column '{column}', message {n}") for n, item in enumerate(value, start=1)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        found = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else kind_of(item)
        raise InputError(f"{place}: expected {{role, content}}, found {found}")
    role, content = item["role"], item["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{place}: unknown role {excerpt(role)}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{place}: content: expected text, found {kind_of(content)}")
    if not content.strip():
        raise InputError(f"{place}: the text is empty; expected a prompt. Add the text or remove the row")
    return {"role": role, "content": without_surrogates(content)}


def _prompt_id(row: Mapping[str, Any], messages: Sequence[Message], place: str) -> str:
    if "prompt_id" not in row:
        return prompt_id_of(messages)
    name = row["prompt_id"]
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"{place}: prompt_id: expected a non-empty text, found {excerpt(name)}; without one, the id "
            "is a hash of the conversation"
        )
    return without_surrogates(name)


def _task(row: Mapping[str, Any], place: str) -> str | None:
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise InputError(f"{place}: task: expected a name, found {kind_of(task)}")
    return task and without_surrogates(task)


def _reference(raw: Mapping[str, Any], column: str, required: bool, place: str) -> str | None:
    if required and column not in raw:
        raise InputError(
            f"{place}: no column '{column}' (prompts.reference_column); found columns: {', '.join(map(str, raw))}"
        )
    value = raw.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{place}: reference column '{column}': expected text or a number, found {kind_of(value)}")


def _metadata(row: Mapping[str, Any], used: set[str]) -> str | None:
    """Return the columns that are not used elsewhere, as JSON text, merged into the row's `metadata` object if any."""
    kept = {key: value for key, value in row.items() if key not in used}
    if "metadata" in row:
        inner = _as_object(row["metadata"])
        kept = {"metadata": row["metadata"], **kept} if inner is None else {**inner, **kept}
    text = json.dumps(kept, ensure_ascii=False, sort_keys=True, default=str)
    return without_surrogates(text) if kept else None


def _as_object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return dict(value) if isinstance(value, Mapping) else None


def _check_task(prompt: Mapping[str, Any], row: Mapping[str, Any], place: str) -> None:
    """Raise InputError if the row lacks what its task's verifier needs, before any proposal is paid for."""
    metadata = json.loads(prompt["metadata"]) if prompt["metadata"] else {}
    if prompt["task"] == "constraints":
        if "constraints" not in metadata:
            raise InputError(f"{place}: task 'constraints' needs a column 'constraints'; found {', '.join(row)}")
        try:
            parse_all(metadata["constraints"])
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    if prompt["task"] == "numeric" and final_number(prompt["reference"] or "") is None:
        raise InputError(
            f"{place}: task 'numeric' needs a number in the reference, found {excerpt(prompt['reference'])}. "
            f"Name the right column in prompts.reference_column; found columns: {', '.join(map(str, row))}"
        )
