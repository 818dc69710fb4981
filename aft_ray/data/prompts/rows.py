"""Turns one raw row of a source into a row of `records.PROMPTS`, or raises InputError with the reason why it cannot.

The prompt is read from the column that the config names, or from the first of `questions.PROMPT_COLUMNS`, together with
the columns beside it that change what is asked (questions.py). It is a text or a conversation (conversations.py). An
answer at the end of a conversation is no part of the prompt: it becomes the reference. Where no column holds a prompt
and the answers are whole conversations, as in preference pairs, the prompt is what all of them begin with.

A row may also have a `prompt_id`, a `task`, a `reference`, and the answers that `prompts.responses` describes. All
other columns are kept in `metadata`.

A prompt with NUL, lone surrogates, control tokens of a chat format, or more than 500,000 characters is rejected, unless
`prompts.unusual_text` is keep. Then it is accepted unchanged, except that U+FFFD replaces lone surrogates, which cannot
be written as UTF-8. (The chat format breaks up control tokens when it tokenizes the text.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aft_ray.config import PromptsConfig, ResponsesConfig
from aft_ray.data.constraints import parse_all
from aft_ray.data.prompts.conversations import excerpt, kind_of, read_conversation
from aft_ray.data.prompts.questions import PROMPT_COLUMNS, Question, read_question
from aft_ray.data.prompts.responses import columns_of, layout_of, prompt_of, read_responses
from aft_ray.errors import InputError
from aft_ray.inference.answers import final_number
from aft_ray.records import Message, prompt_id_of
from aft_ray.templates.control import without_surrogates

MOST_CHARACTERS = 500_000
"""Longest text that `prompts.unusual_text: reject` accepts; a longer one would fill any model's context window."""
CONTROL = re.compile(r"<\|[^\s|<>{}]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>")
"""Control tokens of the common chat formats, since prompts are read before the models that will see them are known."""


class Prompt(NamedTuple):
    """A prompt that was read from a raw row."""

    row: dict[str, Any]
    """The row of `records.PROMPTS` without its `split`."""
    content_id: str
    """What the conversation alone makes of an id: two rows with the same conversation have the same one."""

    @property
    def has_given_id(self) -> bool:
        """Whether the source gave the id."""
        return bool(self.row["prompt_id"] != self.content_id)


def to_prompt(raw: Any, config: PromptsConfig, place: str) -> Prompt:
    """Return the prompt of a raw row. Raises InputError, which begins with `place`."""
    layout = layout_of(config)
    column, question = _question(raw, config.column, place, config.ignore_columns, layout)
    messages, answer = _without_answer(question.messages, column, place)
    reference_column = config.reference_column or "reference"
    if config.unusual_text == "reject":
        _reject_unusual([message["content"] for message in messages] + ([answer] if answer else []), column, place)
    messages = clean(messages)
    row = {key: value for key, value in raw.items() if value is not None}
    used = {"prompt_id", "task", "metadata", reference_column, *question.used, *columns_of(layout)}
    reference = _reference(raw, reference_column, config.reference_column is not None, place)
    if config.unusual_text == "reject" and reference is not None:
        _reject_unusual([reference], reference_column, place)
    prompt = {
        "prompt_id": _prompt_id(row, messages, place),
        "messages": messages,
        "reference": reference if reference is not None or answer is None else without_surrogates(answer),
        "task": config.task or _task(row, place),
        "metadata": _metadata(row, used),
        "responses": None if layout is None else read_responses(raw, layout, place),
    }
    _check_task(prompt, row, place)
    return Prompt(prompt, prompt_id_of(messages))


def conversation(
    raw: Any, column: str | None, place: str, hint: str = "Name the right one in prompts.column"
) -> list[Message]:
    """Return the prompt of a raw row, with the answer that may follow it.

    `hint` ends the error message for a row without a prompt: it says what to do.
    """
    return clean(_question(raw, column, place, (), None, hint)[1].messages)


def clean(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with U+FFFD in the place of lone surrogates."""
    return [Message(role=message["role"], content=without_surrogates(message["content"])) for message in messages]


def _question(
    raw: Any,
    column: str | None,
    place: str,
    ignored: Sequence[str],
    layout: ResponsesConfig | None,
    hint: str = "Name the right one in prompts.column",
) -> tuple[str, Question]:
    """Return the name of the column that holds the prompt, and the question."""
    if isinstance(raw, InputError):
        raise raw
    if not isinstance(raw, Mapping):
        raise InputError(f"{place}: expected an object with a prompt, found {kind_of(raw)}")
    row = {key: value for key, value in raw.items() if value is not None}
    before = prompt_of(row, layout, place) if layout is not None else None
    columns = (column,) if column else PROMPT_COLUMNS
    found = next((name for name in columns if name in row), None)
    if found is not None:
        question = read_question(row, found, ignored, place)
        if before is not None:
            question = question._replace(messages=_longer(question.messages, before, found, place))
        return found, question
    if before is not None and column is None:
        assert layout is not None
        name = layout.columns[0]
        return name, read_question({**row, name: before}, name, ignored, place)
    expected = f"column '{column}' (prompts.column)" if column else f"one of {', '.join(PROMPT_COLUMNS)}"
    raise InputError(
        f"{place}: no prompt; expected {expected}, found columns: {', '.join(map(str, row)) or 'none'}. {hint}"
    )


def _longer(messages: list[Message], before: list[Message], column: str, place: str) -> list[Message]:
    """Return the prompt that the answers' own conversations begin with, of which the prompt's column may be a part."""
    said = [(message["role"], message["content"].strip()) for message in messages]
    longer = [(message["role"], message["content"].strip()) for message in before]
    if longer[-len(said) :] == said or longer[: len(said)] == said:
        return before
    if said[-len(longer) :] == longer:
        return messages  # the row's system column is not repeated in the answers
    raise InputError(f"{place}: the answers follow another conversation than the one in column '{column}'")


def _without_answer(messages: list[Message], column: str, place: str) -> tuple[list[Message], str | None]:
    """Return the prompt and the answer that follows it, if there is one."""
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = last["content"]
    if not messages or messages[-1]["role"] not in {"user", "tool"}:
        found = f"the last turn is '{messages[-1]['role']}'" if messages else "there is no turn"
        where = " before the answer" if answer is not None else ""
        raise InputError(f"{place}: column '{column}': {found}{where}, expected 'user'")
    return messages, answer


def _reject_unusual(texts: Sequence[str], column: str, place: str) -> None:
    for text in texts:
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
    """Return the reference answer of a row's column, or None."""
    if required and column not in raw:
        raise InputError(
            f"{place}: no column '{column}' (prompts.reference_column); found columns: {', '.join(map(str, raw))}"
        )
    value = raw.get(column)
    if value is None:
        return None
    if isinstance(value, list) and value and (messages := read_conversation(value, f"{place}: column '{column}'")):
        value = messages[-1]["content"]  # an answer as a conversation, or as its last message
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
            f"Name the right column in prompts.reference_column; found columns: {', '.join(map(str, row))}. "
            "Task 'math' compares expressions"
        )
    if prompt["task"] in {"math", "choice", "exact"} and not (prompt["reference"] or "").strip():
        raise InputError(
            f"{place}: task '{prompt['task']}' needs a reference. Name its column in prompts.reference_column; found "
            f"columns: {', '.join(map(str, row))}"
        )
