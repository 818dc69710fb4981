"""docs/endpoints.md is true: every example gets an answer from a server that takes what the named one takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from aft_ray.config import Config, OpenAIEngineConfig
from aft_ray.config.endpoints import PRESETS, Preset
from aft_ray.pipeline.endpoints import check_endpoints
from tests.scripted_endpoint import ScriptedEndpoint

PAGE = (Path(__file__).parents[2] / "docs" / "endpoints.md").read_text(encoding="utf-8")
EXAMPLES = {
    example["targets"]["engine"]["preset"]: example["targets"]["engine"]
    for example in map(yaml.safe_load, re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
}
REFUSED = {
    "openai": ("max_tokens", "top_k", "min_p"),
    "azure": ("max_tokens", "top_k", "min_p"),
    "mistral": ("seed", "stream_options", "top_k", "min_p"),
}
"""Fields that a server refuses."""
SENT: dict[str, dict[str, Any]] = {
    "openai": {"max_completion_tokens": 1, "seed": 0},
    "azure": {"max_completion_tokens": 1, "seed": 0},
    "mistral": {"random_seed": 0, "max_tokens": 1},
    "openrouter": {"provider": {"require_parameters": True}, "top_k": 50},
    "vllm": {"top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0},
    "llama_cpp": {"top_k": 50, "min_p": 0.0, "repeat_penalty": 1.0},
    "ollama": {"seed": 0},
    "tgi": {"seed": 0},
}
NOT_SENT = {"ollama": ("top_k", "min_p"), "tgi": ("top_k", "min_p")}
KEYS = {"openai": "OPENAI_API_KEY", "azure": "AZURE_OPENAI_API_KEY", "mistral": "MISTRAL_API_KEY"}
KEYS |= {"openrouter": "OPENROUTER_API_KEY"}


def test_every_preset_has_an_example() -> None:
    assert set(EXAMPLES) == set(PRESETS) == set(get_args(Preset)) == set(SENT)


@pytest.mark.parametrize("preset", EXAMPLES)
def test_the_example_of_a_preset_gets_an_answer(
    endpoint: ScriptedEndpoint, tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS.values():
        monkeypatch.delenv(name, raising=False)
    if preset in KEYS:
        monkeypatch.setenv(KEYS[preset], "sesame")
    endpoint.key_header = "api-key" if preset == "azure" else "Authorization"
    endpoint.key = {"azure": "sesame"}.get(preset, "Bearer sesame" if preset in KEYS else None)
    endpoint.refuse_fields = dict.fromkeys(REFUSED.get(preset, ()), "Extra inputs are not permitted")
    path = "/openai/deployments/DEPLOYMENT" if preset == "azure" else "/v1"
    engine = {**EXAMPLES[preset], "base_url": f"{endpoint.root}{path}", "max_retries": 0}
    raw = {"run": {"dir": str(tmp_path)}, "engine": {"type": "scripted"}}
    config = Config.model_validate({**raw, "targets": {"engine": engine, "sampling": {"top_k": 50}}})
    check_endpoints(config, ["targets"])
    (body,) = endpoint.asked
    assert {name: body.get(name) for name in SENT[preset]} == SENT[preset]
    assert not set(NOT_SENT.get(preset, ())) & set(body)
    query = "?api-version=2024-10-21" if preset == "azure" else ""
    assert endpoint.paths == [f"{path}/chat/completions{query}"]


def test_what_a_config_sets_wins_over_its_preset_and_a_resolved_config_is_read_as_it_is() -> None:
    raw = {"type": "openai", "preset": "vllm", "base_url": "http://a/v1", "model": "m", "api_key_env": "MY_KEY"}
    config = OpenAIEngineConfig.model_validate({**raw, "extra_body": {"min_p": 0.1, "seed_mode": "x"}})
    assert config.api_key_env == "MY_KEY"
    assert config.extra_body == {"top_k": 0, "min_p": 0.1, "repetition_penalty": 1.0, "seed_mode": "x"}
    assert OpenAIEngineConfig.model_validate(config.model_dump(mode="json")) == config


def test_how_a_field_is_sent_may_change_on_resume_and_what_is_asked_for_may_not() -> None:
    raw = {"type": "openai", "base_url": "http://a/v1", "model": "m"}
    plain, renamed, thinks = (
        OpenAIEngineConfig.model_validate({**raw, **others})
        for others in ({}, {"rename": {"max_tokens": "n"}, "stream": False}, {"extra_body": {"effort": "high"}})
    )
    assert plain.identity() == renamed.identity() != thinks.identity()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"extra_body": {"temperature": 0}}, "extra_body.temperature: this follows from the settings of sampling"),
        ({"rename": {"max_tokens": "seed"}}, "rename.max_tokens: seed is the name of another field"),
        ({"omit": ["tempature"]}, "temperature"),
        ({"preset": "opnai"}, "'openai', 'azure'"),
        ({"preset": "vllm", "base_url": None}, "base_url"),
    ],
)
def test_a_request_that_contradicts_itself_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OpenAIEngineConfig.model_validate({"type": "openai", "base_url": "http://a/v1", "model": "m", **settings})
