"""Schemathesis checks the server against its OpenAPI document: it generates requests and checks every reply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
import yaml
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import positive_data_acceptance

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from aft_ray.serving.http.api import make_api
from tests.serving.test_ingress import service_over

API = make_api(service_over(ScriptedEngine(ScriptedEngineConfig(num_tokens=2)), Plan(num_proposals=2)))
schema = schemathesis.openapi.from_asgi("/openapi.json", API)
load_all_checks()


def made_from_the_schema(num_requests: int) -> Callable[[Callable[[Any], None]], Any]:
    """Parametrize a test by operation, with at most `num_requests` generated requests for each."""
    settings = hypothesis.settings(
        max_examples=num_requests,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: schema.parametrize()(settings(test))


def check_reply(case: Any) -> None:
    if isinstance(case.body, dict) and isinstance(case.body.get("aft"), dict):
        case.body["aft"].pop("deadline_s", None)  # a deadline that no engine can meet is rightly a 504
    # A valid body may still be more than this server allows (K, n, a model's name): the schema cannot know.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


@made_from_the_schema(15)
def test_requests_made_from_the_schema_get_replies_that_fit_it(case: Any) -> None:
    check_reply(case)


@pytest.mark.soak
@made_from_the_schema(100)
def test_many_requests_made_from_the_schema_get_replies_that_fit_it(case: Any) -> None:
    check_reply(case)


def test_the_document_has_every_route_with_its_errors() -> None:
    paths = API.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name}", "/health"} <= set(paths)
    for path, operations in paths.items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert not path.startswith("/v1") or {"200", "4XX", "5XX"} <= set(operation["responses"])


@pytest.mark.parametrize("name", ["model", "messages", "temperature", "n", "response_format", "aft", "tools", "user"])
def test_the_document_knows_the_parameters(name: str) -> None:
    assert name in API.openapi()["components"]["schemas"]["ChatBody"]["properties"]


def test_the_document_says_that_a_key_is_needed_where_one_is(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(yaml.safe_dump({"ops": {"sha256": "0" * 64}}))
    engine = ScriptedEngine(ScriptedEngineConfig())
    for settings, schemes in (({}, None), ({"keys_file": str(keys)}, [{"HTTPBearer": []}])):
        document = make_api(service_over(engine, **settings)).openapi()
        needed = [
            operations[method].get("security") for operations in document["paths"].values() for method in operations
        ]
        assert document["paths"]["/v1/chat/completions"]["post"].get("security") == schemes
        assert document["paths"]["/health"]["get"].get("security") is None
        assert needed.count(schemes) == (7 if schemes else len(needed))
