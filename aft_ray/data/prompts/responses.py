"""Reads the answers that a source has for each prompt (`prompts.responses`). They become off-policy proposals.

    {"completions": [{"response": "Nile.", "model": "gpt-4", "overall_score": 8.5}, ...]}    ultrafeedback
    {"answers": ["Nile.", "The Nile."]}                                                      {column: answers}
    {"chosen": [{"role": "user", ...}, {"role": "assistant", "content": "Nile."}], ...}      {columns: [chosen, ...]}

become `[{"text": "Nile.", "model": "gpt-4", "score": 8.5}, ...]`, in the source's order. The columns must exist, but
null and empty answers are skipped, so prompts may have different numbers of responses (see `proposals.too_few`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from aft_ray.config import ULTRAFEEDBACK, PromptsConfig, ResponsesConfig
from aft_ray.errors import InputError
from aft_ray.templates.control import without_surrogates


def layout_of(config: PromptsConfig) -> ResponsesConfig | None:
    """Return where a row keeps its responses, or None if the config asks for none."""
    return ULTRAFEEDBACK if config.responses == "ultrafeedback" else config.responses


def columns_of(layout: ResponsesConfig | None) -> set[str]:
    """Return the names of the columns that hold responses."""
    if layout is None:
        return set()
    return set(layout.columns) if layout.column is None else {layout.column}


def read_responses(raw: Mapping[str, Any], layout: ResponsesConfig, place: str) -> list[dict[str, Any]]:
    """Return the responses of one raw row, as `records.RESPONSE`. Raises InputError for a value of the wrong type."""
    missing = sorted(columns_of(layout) - raw.keys())
    if missing:
        raise InputError(
            f"{place}: no column '{missing[0]}' (prompts.responses); found columns: {', '.join(map(str, raw))}"
        )
    if layout.column is None:
        found = [_from_column(raw[name], layout, f"{place}: column '{name}'") for name in layout.columns]
    else:
        items = [] if raw[layout.column] is None else raw[layout.column]
        if not isinstance(items, list):
            raise InputError(f"{place}: column '{layout.column}': expected a list of responses, found {kind_of(items)}")
        where = f"{place}: column '{layout.column}', response"
        found = [_from_item(item, layout, f"{where} {n}") for n, item in enumerate(items, start=1)]
    return [response for response in found if response is not None]


def _from_column(value: Any, layout: ResponsesConfig, place: str) -> dict[str, Any] | None:
    """Read a column that holds one answer: a text, an object, or a conversation that ends with the answer."""
    if not isinstance(value, list) or not value:
        return _from_item(None if value == [] else value, layout, place)
    last = value[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        found = f"role {excerpt(last.get('role'))}" if isinstance(last, Mapping) else kind_of(last)
        raise InputError(f"{place}: expected messages that end with the assistant's, found {found}")
    return _response(last.get("content"), None, None, f"{place}, last message, field 'content'")


def _from_item(item: Any, layout: ResponsesConfig, place: str) -> dict[str, Any] | None:
    if item is None or isinstance(item, str):
        return _response(item, None, None, place)
    if not isinstance(item, Mapping):
        raise InputError(f"{place}: expected text or an object, found {kind_of(item)}")
    if layout.text not in item:
        raise InputError(
            f"{place}: no field '{layout.text}' (prompts.responses.text); found {', '.join(map(str, item))}"
        )
    model = item.get(layout.model) if layout.model else None
    if model is not None and not isinstance(model, str):
        raise InputError(f"{place}, field '{layout.model}': expected the name of a model, found {kind_of(model)}")
    score = _score(item.get(layout.score), f"{place}, field '{layout.score}'") if layout.score else None
    return _response(item[layout.text], model, score, f"{place}, field '{layout.text}'")


def _response(text: Any, model: str | None, score: float | None, place: str) -> dict[str, Any] | None:
    if text is not None and not isinstance(text, str):
        raise InputError(f"{place}: expected text, found {kind_of(text)}")
    if text is None or not text.strip():
        return None
    return {"text": without_surrogates(text), "model": model and without_surrogates(model), "score": score}


def _score(value: Any, place: str) -> float | None:
    """Return the source's score, or None. NaN is how data frames write a missing one."""
    if value is None or value != value:
        return None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the range of float
        pass
    raise InputError(f"{place}: expected a finite number, found {kind_of(value)}")


def kind_of(value: Any) -> str:
    """Return the type of a value in words, for an error message."""
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def excerpt(value: Any) -> str:
    """Return the repr of a value for an error message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
