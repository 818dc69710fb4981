"""Reads the answers that a source has for each prompt (`prompts.responses`). They become off-policy proposals.

    {"completions": [{"response": "Nile.", "model": "gpt-4", "overall_score": 8.5}, ...]}    ultrafeedback
    {"answers": [{"answer": "Nile.", "model": "gpt-4", "rank": 1}, ...]}                     nectar
    {"answers": ["Nile.", "The Nile."]}                                                      {column: answers}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", "content": "Nile."}], ...}      preference
    {"response": "Nile.", "helpfulness": 4, ...}, one answer per row                         helpsteer

become `[{"text": "Nile.", "model": "gpt-4", "score": 8.5}, ...]`, in the source's order. The columns must exist, but
null and empty answers are skipped, so prompts may have different numbers of responses (see `proposals.too_few`). An
answer from a column of its own, whose model is not told, is named after the column: `chosen`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aft_ray.config import LAYOUTS, PromptsConfig, ResponsesConfig
from aft_ray.data.prompts.conversations import kind_of, parsed, read_answer
from aft_ray.errors import InputError
from aft_ray.records import Message
from aft_ray.templates.control import without_surrogates

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")


def layout_of(config: PromptsConfig) -> ResponsesConfig | None:
    """Return where a row keeps its responses, or None if the config asks for none."""
    return LAYOUTS[config.responses] if isinstance(config.responses, str) else config.responses


def columns_of(layout: ResponsesConfig | None) -> set[str]:
    """Return the names of the columns that hold responses, their models and their scores."""
    if layout is None:
        return set()
    return {*layout.columns, *layout.models, *layout.scores} if layout.column is None else {layout.column}


def prompt_of(row: Mapping[str, Any], layout: ResponsesConfig, place: str) -> list[Message] | None:
    """Return the conversation that all answers of a row follow, or None where the answers are texts alone.

    Raises InputError where they follow different ones.
    """
    found: list[Message] | None = None
    for name in layout.columns:
        answered = read_answer(row.get(name), f"{place}: column '{name}'")
        if answered is None or not answered[0]:
            continue
        if found is not None and found != answered[0]:
            raise InputError(f"{place}: the conversations in {', '.join(layout.columns)} differ before their answers")
        found = answered[0]
    return found


def read_responses(raw: Mapping[str, Any], layout: ResponsesConfig, place: str) -> list[dict[str, Any]]:
    """Return the responses of one raw row, as `records.RESPONSE`. Raises InputError for a value of the wrong type."""
    missing = sorted(({layout.column} if layout.column else set(layout.columns)) - raw.keys())
    if missing:
        raise InputError(
            f"{place}: no column '{missing[0]}' (prompts.responses); found columns: {', '.join(map(str, raw))}"
        )
    if layout.column is None:
        found = [_from_column(raw, number, layout, place) for number in range(len(layout.columns))]
    else:
        items = parsed(raw[layout.column])
        items = [] if items is None else items
        if not isinstance(items, list):
            raise InputError(f"{place}: column '{layout.column}': expected a list of responses, found {kind_of(items)}")
        where = f"{place}: column '{layout.column}', response"
        found = [_from_item(item, layout, f"{where} {n}") for n, item in enumerate(items, start=1)]
    return [response for response in found if response is not None]


def merged(responses: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the responses of several rows of one prompt, each text of a model once, with its first score."""
    kept: dict[tuple[str, str | None], dict[str, Any]] = {}
    for response in responses:
        same = kept.setdefault((response["text"], response["model"]), dict(response))
        if same["score"] is None:
            same["score"] = response["score"]
    return list(kept.values())


def _from_column(raw: Mapping[str, Any], number: int, layout: ResponsesConfig, place: str) -> dict[str, Any] | None:
    """Read a column that holds one answer: a text, an object, or a conversation that ends with the answer."""
    name = layout.columns[number]
    value, where = raw[name], f"{place}: column '{name}'"
    answered = read_answer(value, where)
    if answered is not None:
        response = _response(answered[1], None, None, where)
    else:
        response = _from_item(None if value == [] else value, layout, where)
    if response is None:
        return None
    if layout.models and raw.get(layout.models[number]) is not None:
        response["model"] = _model(raw[layout.models[number]], f"{place}: column '{layout.models[number]}'")
    if layout.scores and raw.get(layout.scores[number]) is not None:
        response["score"] = _score(raw[layout.scores[number]], f"{place}: column '{layout.scores[number]}'")
    return {**response, "model": response["model"] or without_surrogates(name)}


def _from_item(item: Any, layout: ResponsesConfig, place: str) -> dict[str, Any] | None:
    if item is None or isinstance(item, str):
        return _response(item, None, None, place)
    if not isinstance(item, Mapping):
        raise InputError(f"{place}: expected text or an object, found {kind_of(item)}")
    if layout.text not in item:
        raise InputError(
            f"{place}: no field '{layout.text}' (prompts.responses.text); found {', '.join(map(str, item))}"
        )
    model = _model(item.get(layout.model), f"{place}, field '{layout.model}'") if layout.model else None
    score = _score(item.get(layout.score), f"{place}, field '{layout.score}'") if layout.score else None
    rank = _score(item.get(layout.rank), f"{place}, field '{layout.rank}'") if layout.rank else None
    score = score if rank is None else -rank
    return _response(item[layout.text], model, score, f"{place}, field '{layout.text}'")


def _response(text: Any, model: str | None, score: float | None, place: str) -> dict[str, Any] | None:
    if text is not None and not isinstance(text, str):
        raise InputError(f"{place}: expected text, found {kind_of(text)}")
    if text is None or not text.strip():
        return None
    return {"text": without_surrogates(text), "model": model and without_surrogates(model), "score": score}


def _model(value: Any, place: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"{place}: expected the name of a model, found {kind_of(value)}")
    return value


def _score(value: Any, place: str) -> float | None:
    """Return the source's score, or None. Data frames write a missing one as NaN; CSV writes numbers as text."""
    if value is None or value != value:
        return None
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the range of float
        pass
    raise InputError(f"{place}: expected a finite number, found {kind_of(value)}")
