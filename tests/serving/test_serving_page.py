"""docs/serving.md lists every plan field, parameter, metric, limit and error code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from aft_ray.config import ReplicaConfig, ServingConfig
from aft_ray.inference.plan import Plan
from aft_ray.serving.metrics import DEFINITIONS
from aft_ray.serving.openai_request import SWITCHES, ChatBody

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


def test_every_limit_is_named_and_exists() -> None:
    named = set(re.findall(r"`(max_\w+|cors_origins|api_keys_env)", PAGE))
    limits = {name for name in ServingConfig.model_fields if name.startswith("max_")}
    assert limits <= named
    assert named - {"max_completion_tokens"} <= {*ServingConfig.model_fields, *ReplicaConfig.model_fields}
