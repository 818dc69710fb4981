"""Answers that come with a prompt are read in the UltraFeedback layout or a configured one; bad ones are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts import read_prompts
from aft_ray.errors import InputError
from aft_ray.records import PROMPTS, metadata_of

ULTRAFEEDBACK_ROW = {
    "source": "sharegpt",
    "instruction": "Name a river.",
    "models": ["gpt-4", "alpaca-7b"],
    "completions": [
        {"model": "gpt-4", "response": "The Nile.", "overall_score": 8.5, "annotations": {"honesty": {"Rating": "5"}}},
        {"model": "alpaca-7b", "response": "Nile", "overall_score": 6, "annotations": None},
    ],
}


def read_one(tmp_path: Path, row: dict[str, Any], responses: Any) -> dict[str, Any]:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    [prompt] = read_prompts(PromptsConfig(source=str(path), responses=responses, on_bad_row="stop"))
    return prompt


def response(text: str, model: str | None = None, score: float | None = None) -> dict[str, Any]:
    return {"text": text, "model": model, "score": score}


def test_the_ultrafeedback_layout_is_known_and_its_column_is_not_repeated_in_metadata(tmp_path: Path) -> None:
    prompt = read_one(tmp_path, ULTRAFEEDBACK_ROW, "ultrafeedback")
    assert prompt["responses"] == [response("The Nile.", "gpt-4", 8.5), response("Nile", "alpaca-7b", 6.0)]
    assert metadata_of(prompt) == {"source": "sharegpt", "models": ["gpt-4", "alpaca-7b"]}


def test_without_the_setting_responses_are_none_and_the_column_stays_in_metadata(tmp_path: Path) -> None:
    prompt = read_one(tmp_path, ULTRAFEEDBACK_ROW, None)
    assert prompt["responses"] is None
    assert len(metadata_of(prompt)["completions"]) == 2


@pytest.mark.parametrize(
    ("row", "layout", "expected"),
    [
        ({"answers": ["a", "b"]}, {"column": "answers"}, [response("a"), response("b")]),
        ({"answers": ["a", "", None, " "]}, {"column": "answers"}, [response("a")]),
        ({"answers": []}, {"column": "answers"}, []),
        ({"answers": None}, {"column": "answers"}, []),
        (
            {"answers": [{"body": "a", "by": "m", "stars": 3}, {"body": None}, {"body": "b", "stars": None}]},
            {"column": "answers", "text": "body", "model": "by", "score": "stars"},
            [response("a", "m", 3.0), response("b")],
        ),
        ({"answers": [{"text": "a", "model": "m"}]}, {"column": "answers", "model": None}, [response("a")]),
        ({"good": "a", "bad": "b"}, {"columns": ["good", "bad"]}, [response("a", "good"), response("b", "bad")]),
        ({"good": None, "bad": ""}, {"columns": ["good", "bad"]}, []),
        (
            {"good": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "bad": []},
            {"columns": ["good", "bad"]},
            [response("a", "good")],
        ),
        ({"answers": ["half \ud83d"]}, {"column": "answers"}, [response("half \ufffd")]),
    ],
    ids=["texts", "empty", "none", "null", "objects", "no-model", "columns", "null-columns", "messages", "surrogate"],
)
def test_other_layouts_are_mapped(
    tmp_path: Path, row: dict[str, Any], layout: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    prompt = read_one(tmp_path, {"prompt": "q", **row}, layout)
    assert prompt["responses"] == expected
    assert prompt["metadata"] is None
    pa.Table.from_pylist([prompt], schema=PROMPTS)


@pytest.mark.parametrize(
    ("row", "layout", "message"),
    [
        ({}, {"column": "answers"}, r"no column 'answers' \(prompts.responses\); found columns: prompt"),
        ({"good": "a"}, {"columns": ["good", "bad"]}, "no column 'bad'"),
        ({"answers": "a"}, {"column": "answers"}, "column 'answers': expected a list of responses, found text"),
        (
            {"answers": ["a", 3]},
            {"column": "answers"},
            "'answers', response 2: expected text or an object, found a num",
        ),
        ({"answers": [{"body": "a"}]}, {"column": "answers"}, "response 1: no field 'text' .* found body"),
        ({"answers": [{"text": ["a"]}]}, {"column": "answers"}, "field 'text': expected text, found a list"),
        ({"answers": [{"text": "a", "model": 3}]}, {"column": "answers"}, "field 'model': expected the name of a mod"),
        (
            {"answers": [{"text": "a", "stars": "N/A"}]},
            {"column": "answers", "score": "stars"},
            "field 'stars': expected a finite number, found text",
        ),
        (
            {"answers": [{"text": "a", "stars": 10**400}]},
            {"column": "answers", "score": "stars"},
            "field 'stars': expected a finite number, found a number",
        ),
        (
            {"good": [{"role": "user", "content": "q"}]},
            {"columns": ["good"]},
            "column 'good': expected messages that end with the assistant's, found role 'user'",
        ),
        ({"good": False}, {"columns": ["good"]}, "column 'good': expected text or an object, found a boolean"),
        ({"answers": False}, {"column": "answers"}, "expected a list of responses, found a boolean"),
        ({"good": 3}, {"columns": ["good"]}, "column 'good': expected text or an object, found a number"),
    ],
)
def test_a_response_of_the_wrong_type_is_refused_with_its_place(
    tmp_path: Path, row: dict[str, Any], layout: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"prompts\.jsonl:1: .*{message}"):
        read_one(tmp_path, {"prompt": "q", **row}, layout)


def test_responses_are_read_from_parquet_and_from_a_prompts_folder_again(tmp_path: Path) -> None:
    row = {key: value for key, value in ULTRAFEEDBACK_ROW.items() if key != "source"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "source.parquet")
    [prompt] = read_prompts(PromptsConfig(source=str(tmp_path / "source.parquet"), responses="ultrafeedback"))
    assert [r["model"] for r in prompt["responses"]] == ["gpt-4", "alpaca-7b"]
    pq.write_table(pa.Table.from_pylist([prompt], schema=PROMPTS), tmp_path / "again.parquet")
    layout = {"column": "responses", "score": "score"}
    config = PromptsConfig.model_validate({"source": str(tmp_path / "again.parquet"), "responses": layout})
    assert list(read_prompts(config)) == [prompt]
