"""docs/serving.md lists every plan field, parameter, metric, limit and error code."""

from __future__ import annotations

import dataclasses
import re
from http import HTTPStatus
from pathlib import Path

import pytest

import aft_ray.serving
from aft_ray.config import ReplicaConfig, ServingConfig
from aft_ray.inference.plan import Plan
from aft_ray.serving.metrics import DEFINITIONS
from aft_ray.serving.openai.request import CAP_EXCEEDED, SWITCHES, ChatBody

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
WORDS = set(re.findall(r"\w+", PAGE))


@pytest.mark.parametrize("name", [*(field.name for field in dataclasses.fields(Plan)), *SWITCHES])
def test_every_field_of_the_aft_object_is_explained(name: str) -> None:
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("name", sorted(set(ChatBody.model_fields) - {"model", "messages"}))
def test_every_parameter_is_explained(name: str) -> None:
    assert name in WORDS


def test_every_metric_is_listed_under_its_exported_name_and_no_other() -> None:
    assert set(re.findall(r"ray_(aft_\w+)", PAGE)) == set(DEFINITIONS)


def codes_of_the_source() -> set[str]:
    """Return every code that the server's source gives an error."""
    folder = Path(aft_ray.serving.__file__).parent
    sources = {file.name: file.read_text() for file in folder.glob("*.py")}
    found = set(re.findall(r'\bcode="(\w+)"', "\n".join(sources.values())))
    return found | {CAP_EXCEEDED, "body_too_large"} | {HTTPStatus(status).name.lower() for status in (404, 405)}


@pytest.mark.parametrize("code", sorted(codes_of_the_source()))
def test_every_code_of_an_error_is_in_the_table(code: str) -> None:
    table = PAGE.partition("## Errors\n")[2].partition("\n## ")[0]
    assert f"`{code}`" in table


def test_every_limit_is_named_and_exists() -> None:
    named = set(re.findall(r"`(max_\w+|cors_origins|api_keys_env)", PAGE))
    limits = {name for name in ServingConfig.model_fields if name.startswith("max_")}
    assert limits <= named
    assert named - {"max_completion_tokens"} <= {*ServingConfig.model_fields, *ReplicaConfig.model_fields}
