"""Small things that clients and operators meet: null, floats without a fraction, links, ports, keys, paths."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from aft_ray.config import ScriptedEngineConfig, ServingConfig
from aft_ray.engines.base import EngineInfo, Sampling
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.errors import ConfigError
from aft_ray.inference.plan import Plan
from aft_ray.serving.adapters import found_in, keep_version
from aft_ray.serving.app import free_port
from aft_ray.serving.errors import without_paths
from aft_ray.serving.http.admin import _take_changed
from aft_ray.serving.limits.keys import KeyRing, digest, read_keys
from aft_ray.serving.run_request import PoolInfo
from aft_ray.serving.service import check_plan_fits
from aft_ray.storage import Folder
from tests.serving.test_completions import complete, service_of
from tests.serving.test_final_layer import refused
from tests.serving.test_ingress import BODY, over_http, post, service_over
from tests.templates.families import make_tokenizer

SHORT = Plan(
    num_proposals=2,
    proposal=Sampling(max_tokens=64),
    aggregation=(Sampling(max_tokens=64),),
    final=Sampling(max_tokens=64),
)


def service(**settings: Any) -> Any:
    return service_over(ScriptedEngine(ScriptedEngineConfig()), **settings)


@pytest.mark.parametrize(
    "asked",
    [
        {"stream": None, "aft": None, "n": None, "stop": None},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"top_k": -1, "top_p": 0, "min_p": 0},
        {"max_tokens": 64.0, "seed": 3.0},
        {"stop": ""},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_accepted(asked: dict[str, Any]) -> None:
    response = post(service(), **asked)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("asked", [{"max_tokens": 64.5}, {"top_k": -2}, {"top_p": -0.1}, {"stop": [""]}], ids=str)
def test_what_asks_for_the_impossible_is_refused(asked: dict[str, Any]) -> None:
    assert post(service(), **asked).status_code == 400


@pytest.mark.parametrize("stop", [[""], [3]], ids=str)
def test_an_error_names_the_parameter_as_the_client_wrote_it(stop: list[Any]) -> None:
    error = post(service(), stop=stop).json()["error"]
    assert error["param"] in {"stop", "stop.0"}, error
    assert error["message"].startswith(f"{error['param']}: ")


CHATTY = {"chat_id": "c-1", "options": {"num_ctx": 4096}, "prediction": {"type": "content", "content": "x"}}
"""Fields that popular clients always send."""


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_ignored_and_named_where_the_server_says_so(path: str, stream: bool) -> None:
    asked = {
        "/v1/responses": {"input": "Hello"},
        "/v1/completions": {"prompt": "Hello"},
    }.get(path, {"messages": BODY["messages"]})
    extra = CHATTY if path != "/v1/responses" else {name: CHATTY[name] for name in ("chat_id", "options", "prediction")}
    body = {**asked, **extra, "stream": stream}
    refusal = over_http(service(), lambda client: client.post(path, json=body))
    error = refusal.json()["error"]
    assert (refusal.status_code, error["param"], error["code"]) == (400, "chat_id", "unknown_parameter")
    served = service(unknown_fields="ignore")
    reply = over_http(served, lambda client: client.post(path, json=body))
    assert reply.status_code == 200, reply.text
    assert set(reply.headers["x-aft-ignored"].split(", ")) == {"chat_id", "options", "prediction"}
    assert "x-aft-ignored" not in over_http(served, lambda client: client.post(path, json=asked)).headers


def test_a_failed_draft_has_a_reason_but_none_of_the_engines_words() -> None:
    engine = ScriptedEngine(ScriptedEngineConfig(fail_on=(2,), empty_on=(1,)))
    plan = dataclasses.replace(SHORT, num_proposals=3, quorum=1)
    for stream in (False, True):
        reply = post(service_over(engine, plan), aft={"include_proposals": True}, stream=stream)
        assert '"engine_error"' in reply.text and '"empty_answer"' in reply.text
        assert "scripted failure" not in reply.text


class Plain(ScriptedEngine):
    """An engine without penalties."""

    @property
    def info(self) -> EngineInfo:
        return dataclasses.replace(super().info, honours=frozenset())


def test_a_penalty_that_the_engines_lack_is_ignored_with_the_unknown_fields() -> None:
    plain = Plain(ScriptedEngineConfig())
    assert refused(post(service_over(plain), frequency_penalty=0.5)) == (400, "frequency_penalty")
    reply = post(service_over(plain, unknown_fields="ignore"), frequency_penalty=0.5)
    assert plain.requests[-1].sampling.frequency_penalty == 0
    assert (reply.status_code, reply.headers["x-aft-ignored"]) == (200, "frequency_penalty")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"functions": [{"name": "weather"}]}, "functions"),
        ({"aft": {"num_layer": 1}}, "aft.num_layer"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused_all_the_same(asked: dict[str, Any], param: str) -> None:
    assert refused(post(service(unknown_fields="ignore", excess_max_tokens="clamp"), **asked)) == (400, param)


@pytest.mark.parametrize(
    ("num_layers", "asked", "written"),
    [(0, 100_000, 300), (1, 100_000, 300), (0, 250, 250), (1, 20, 20)],
)
def test_max_tokens_above_the_servers_cap_are_clamped_where_it_says_so(
    num_layers: int, asked: int, written: int
) -> None:
    engine = ScriptedEngine(ScriptedEngineConfig())
    served = service_over(engine, max_tokens=300, excess_max_tokens="clamp", plan=SHORT)
    assert post(served, max_tokens=asked, aft={"num_layers": num_layers}).status_code == 200
    assert engine.requests[-1].sampling.max_tokens == written
    if asked > 300:
        assert refused(post(service(max_tokens=300, plan=SHORT), max_tokens=asked)) == (400, "max_tokens")


@pytest.mark.parametrize("num_layers", [0, 1])
def test_max_tokens_are_clamped_to_what_the_prompt_leaves_of_the_window(tmp_path: Path, num_layers: int) -> None:
    make_tokenizer("llama3").save_pretrained(tmp_path)
    engine = ScriptedEngine(ScriptedEngineConfig(tokenizer=str(tmp_path), max_model_len=2000))
    asked = {"prompt": "word " * 20, "max_tokens": 4000, "aft": {"num_layers": num_layers}}
    assert complete(service_of(engine, plan=SHORT), **asked).status_code == 400
    served = service_of(engine, plan=SHORT, excess_max_tokens="clamp")
    assert complete(served, **asked).status_code == 200
    request = engine.requests[-1]
    assert request.sampling.max_tokens == 2000 - len(request.prompt_ids) > 64
    # a prompt that leaves less than the default plan's own is too long, as ever
    too_long = complete(served, **asked | {"prompt": "word " * 1500})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


def test_a_trailing_slash_is_not_redirected() -> None:
    response = over_http(service(), lambda client: client.get("/v1/models/"))
    assert response.status_code == 404 and "location" not in response.headers


def test_listed_plans_are_models_of_their_own() -> None:
    served = service(listed_plans=("single", "k5-l2"))
    listed = over_http(served, lambda client: client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["base", "base@single", "base@k5-l2"]
    assert over_http(served, lambda client: client.get("/v1/models/base@k5-l2")).json()["id"] == "base@k5-l2"
    assert over_http(served, lambda client: client.get("/v1/models/base@deep")).status_code == 404


def test_a_page_may_send_the_headers_of_the_javascript_client_and_read_the_limits() -> None:
    origin = "https://chat.example.org"
    sent = "authorization,content-type,x-stainless-arch,x-stainless-retry-count"
    headers = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": sent}
    served = service(cors_origins=(origin,))
    reply = over_http(served, lambda client: client.options("/v1/chat/completions", headers=headers))
    assert reply.status_code == 200 and "x-stainless-arch" in reply.headers["access-control-allow-headers"]
    models = over_http(served, lambda client: client.get("/v1/models", headers={"origin": origin}))
    assert "x-ratelimit-remaining-tokens" in models.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (f"alice: {{sha256: {digest('')}}}", "the hash of an empty key"),
        (f"key-1: {{sha256: {digest('a')}}}", "have such names"),
    ],
)
def test_a_key_file_that_lets_everybody_in_or_hides_another_key_is_refused(
    tmp_path: Path, entry: str, reason: str
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(entry)
    with pytest.raises(ConfigError, match=reason):
        read_keys(str(file))


@pytest.mark.parametrize("header", ["Bearer ", "Bearer", "", None])
def test_an_empty_key_is_no_key(header: str | None) -> None:
    assert KeyRing([digest("")]).find(header) is None


def test_prompts_are_cached_by_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"alice: {{sha256: {digest('a')}}}\nbob: {{sha256: {digest('b')}}}")
    served = service(keys_file=str(file))
    body = {"messages": [{"role": "user", "content": "hi"}]}
    for key in "ab":
        headers = {"authorization": f"Bearer {key}"}
        over_http(served, lambda client, h=headers: client.post("/v1/chat/completions", json=body, headers=h))  # type: ignore[misc]
    assert {request.cache_salt for request in served.answers.aggregator.engine.requests} == {"alice", "bob"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("adapter /runs/secret/model/aft: no adapter_config.json", "adapter aft: no adapter_config.json"),
        ("no file s3://bucket/secret/aft here", "no file aft here"),
        ("no answer from http://10.0.0.7:8000/v1/chat : refused", "no answer from <address> : refused"),
        ("10.0.0.7:8000 and judge.lan:80 are gone", "<address> and <address> are gone"),
        ("status 500: version 1.2.3 of model.py:3 of it", "status 500: version 1.2.3 of model.py:3 of it"),
        ("2 of 5 answers, and/or 1/2", "2 of 5 answers, and/or 1/2"),
    ],
)
def test_an_error_names_no_folder_of_the_server_and_no_other_server(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"serving\.port: cannot listen on 127\.0\.0\.1"):
            free_port("127.0.0.1", taken.getsockname()[1])


def test_a_plan_without_room_for_a_prompt_is_refused() -> None:
    info = EngineInfo(model="m", tokenizer=None, max_model_len=512)
    pools = PoolInfo(aggregator=info, single=info)
    with pytest.raises(ConfigError, match="layer 0: max_tokens 512 leaves no room"):
        check_plan_fits(Plan(), pools)


def test_a_plan_with_a_bias_on_a_token_that_no_model_has_is_refused() -> None:
    info = EngineInfo(model="m", tokenizer=None, max_model_len=4096)
    pools = PoolInfo(aggregator=info, single=info, aggregator_vocabulary=100)
    with pytest.raises(ConfigError, match=r"serving\.plan: logit_bias: token id 100 is outside .* of 100 tokens"):
        check_plan_fits(Plan(final=Sampling(logit_bias=((100, 1.0),))), pools)


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(os.urandom(64))
    return folder


def test_links_in_a_watched_folder_are_no_adapters(tmp_path: Path) -> None:
    watched, outside = tmp_path / "watched", adapter(tmp_path / "outside")
    adapter(watched / "good")
    (watched / "loop").symlink_to("loop")
    (watched / "elsewhere").symlink_to(outside)
    linked = adapter(watched / "linked")
    (linked / "adapter_model.safetensors").unlink()
    (linked / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    assert list(found_in(Folder.at(watched))) == ["good"]


def test_a_copy_of_an_adapter_keeps_its_mode(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "aft")
    (folder / "adapter_model.safetensors").chmod(0o600)
    kept = Path(keep_version(str(folder)).path)
    assert (kept / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o600


def test_an_adapter_that_comes_changes_no_default_and_one_that_goes_is_served_no_longer(tmp_path: Path) -> None:
    served = service(adapters_dir=str(tmp_path))
    folder = adapter(tmp_path / "experiment")

    async def look(times: int) -> list[str]:
        seen: dict[str, Any] = {}
        for _ in range(times):
            seen = await _take_changed(served, Folder.at(tmp_path), seen)
        return list(served.current_config.adapters or {})

    assert asyncio.run(look(2)) == ["experiment"]
    assert post(served, model=None).json()["model"] == "base"
    folder.rename(tmp_path / ".gone")
    assert asyncio.run(look(2)) == []
    (tmp_path / ".gone").rename(folder)
    assert asyncio.run(look(2)) == ["experiment"]
    folder.rename(tmp_path / ".gone")
    tmp_path.rename(tmp_path.with_name("unmounted"))
    assert asyncio.run(look(2)) == ["experiment"]
    assert isinstance(served.config, ServingConfig)
