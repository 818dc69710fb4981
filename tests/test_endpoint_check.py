"""Every endpoint of the steps to come is asked for one token before anything is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from aft_ray.config import Config
from aft_ray.errors import ConfigError
from aft_ray.pipeline import LINE
from aft_ray.pipeline.endpoints import check_endpoints
from aft_ray.pipeline.steps import run_steps
from aft_ray.runs import Manifest, write_manifest
from aft_ray.storage import Folder
from tests.scripted_endpoint import KEY_ENV, ScriptedEndpoint


def config_of(folder: Path, **sections: Any) -> Config:
    run = {"run": {"dir": str(folder / "run")}, "engine": {"type": "scripted"}}
    return Config.model_validate({**run, **sections})


def remote(endpoint: ScriptedEndpoint) -> dict[str, Any]:
    """A run whose drafts, judge and teacher are all behind the endpoint."""
    engine = endpoint.settings(max_retries=0)
    return {
        "proposals": {"engine": engine},
        "scores": {"scorer": "judge", "judge": {"engine": engine}},
        "targets": {"engine": engine, "sampling": {"temperature": 0.5, "stop": ["END"]}},
    }


def test_every_step_is_asked_with_its_own_sampling_for_one_token(endpoint: ScriptedEndpoint, tmp_path: Path) -> None:
    check_endpoints(config_of(tmp_path, **remote(endpoint)), LINE)
    assert sorted(body["temperature"] for body in endpoint.asked) == [0.0, 0.5, 1.0]
    assert {body["max_tokens"] for body in endpoint.asked} == {1}
    assert [body["stop"] for body in endpoint.asked if "stop" in body] == [["END"]]


def test_only_steps_that_are_about_to_run_and_are_not_done_are_asked(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    config = config_of(tmp_path, **remote(endpoint))
    check_endpoints(config, ["prompts", "report"])
    assert endpoint.asked == []
    done = Manifest(stage="targets", status="done", fingerprint="f", settings={}, rows_in=9, failed={"EngineError": 1})
    write_manifest(Folder.at(config.run.dir).child("targets"), done)
    check_endpoints(config, ["targets"])
    assert endpoint.asked == []
    check_endpoints(config, ["targets"], retry_failed=True)
    assert len(endpoint.asked) == 1


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "wrong key": ({"key": "Bearer another"}, {}, "targets.engine: .* as model teacher: status 401: no such key"),
    "unknown field": ({"refuse_fields": {"seed": "not permitted"}}, {}, "status 422: body.seed: not permitted"),
    "a web page": ({"page": "<html>"}, {}, "the reply is no answer but text/html: <html>"),
    "no port": ({}, {"base_url": "http://127.0.0.1:9/v1"}, "targets.engine: .* no answer from 127.0.0.1: ConnectError"),
    "no key": ({}, {"api_key_env": "AFT_RAY_NOT_SET"}, "environment variables are missing: AFT_RAY_NOT_SET on "),
    "no URL": ({}, {"base_url": "localhost:8000"}, "base_url 'localhost:8000' is no URL"),
}


@pytest.mark.parametrize(("knobs", "settings", "words"), BROKEN.values(), ids=BROKEN)
def test_a_run_whose_teacher_cannot_answer_is_refused_before_its_first_step(
    endpoint: ScriptedEndpoint, tmp_path: Path, knobs: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    vars(endpoint).update(knobs)
    config = config_of(tmp_path, targets={"engine": endpoint.settings(max_retries=0, **settings)})
    with pytest.raises(ConfigError, match=words) as refused:
        run_steps(config, LINE)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "run" / "prompts").exists()


def test_a_reasoning_model_that_cannot_stop_after_one_token_is_there(
    endpoint: ScriptedEndpoint, tmp_path: Path
) -> None:
    endpoint.refuse_first = [(400, {})]
    endpoint.refusal_body = lambda status: {
        "error": {"message": "Could not finish the message because max_tokens or model output limit was reached."}
    }
    check_endpoints(config_of(tmp_path, targets={"engine": endpoint.settings()}), LINE)
    assert len(endpoint.asked) == 1


def test_an_endpoint_to_evaluate_is_asked_for_its_models(
    endpoint: ScriptedEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(url: str, **others: Any) -> Config:
        return config_of(tmp_path, evaluation={"base_url": url, "api_key_env": KEY_ENV, **others})

    endpoint.models = ("base", "sft", "aft")
    check_endpoints(evaluated(endpoint.url), ["evaluate"])
    unknown = evaluated(endpoint.url, systems=[{"name": "x", "model": "other@k3-l2"}])
    with pytest.raises(ConfigError, match="serves aft, base, sft, and 'other@k3-l2' is to be evaluated"):
        check_endpoints(unknown, ["evaluate"])
    check_endpoints(unknown, ["targets"])
    with pytest.raises(ConfigError, match="no answer: ConnectError"):
        check_endpoints(evaluated("http://127.0.0.1:9"), ["evaluate"])
    endpoint.key = "Bearer another"
    with pytest.raises(ConfigError, match="status 401: no such key"):
        check_endpoints(evaluated(endpoint.url), ["evaluate"])
    assert httpx.get(f"{endpoint.url}/models").status_code == 401
