"""Clients that people use: every way in which the stock `openai` client asks, and LiteLLM in front of the endpoint."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from pydantic import BaseModel

from aft_ray.config import ScriptedEngineConfig
from aft_ray.inference.plan import Plan
from aft_ray.serving.app import free_port
from tests.serving.local_server import serving
from tests.serving.test_final_layer import JsonEngine
from tests.serving.test_ingress import service_over


def saying(text: str) -> Any:
    """Return a conversation of one user turn."""
    return [{"role": "user", "content": text}]


USER = saying("Name three rivers.")
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
MASTER_KEY = f"sk-{secrets.token_hex(32)}"
LITELLM = os.environ.get("AFT_RAY_LITELLM") or shutil.which("litellm")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = JsonEngine(ScriptedEngineConfig(seconds_per_token=0.005, fail_on=(4,)))
    service = service_over(engine, Plan(num_proposals=2), adapters={"aft": "/adapters/aft"}, max_body_bytes=100_000)
    with serving(service) as url:
        yield f"{url}/v1"


@pytest.fixture
def stock(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_a_raw_response_has_the_headers_and_parses_to_the_same_completion(stock: openai.OpenAI) -> None:
    raw = stock.chat.completions.with_raw_response.create(model="aft", messages=USER, seed=5)
    assert raw.status_code == 200
    assert raw.headers["content-type"] == "application/json"
    completion = raw.parse()
    assert completion.choices[0].message.content
    assert completion._request_id == raw.request_id == raw.headers["x-request-id"]


def test_a_streaming_response_can_be_read_line_by_line(stock: openai.OpenAI) -> None:
    ask = stock.chat.completions.with_streaming_response.create
    with ask(model="aft", messages=USER, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"


def test_the_stream_helper_accumulates_the_plain_answer(stock: openai.OpenAI) -> None:
    plain = stock.chat.completions.create(model="aft", messages=USER, seed=5)
    with stock.chat.completions.stream(model="aft", messages=USER, seed=5) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == plain.choices[0].message.content
    assert kinds.count("content.delta") == 1 + 8 and kinds[-1] == "content.done"  # the role comes with empty content


class Rivers(BaseModel):
    """The record that the answer is parsed into."""

    rivers: int


def test_an_answer_is_parsed_into_a_model(stock: openai.OpenAI) -> None:
    completion = stock.chat.completions.parse(model="aft", messages=USER, response_format=Rivers)
    assert completion.choices[0].message.parsed == Rivers(rivers=3)


def test_the_async_client_asks_many_questions_at_once(url: str) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="unused") as client:
            calls = [client.chat.completions.create(model="aft", messages=USER, seed=seed) for seed in range(20)]
            return [reply.choices[0].message.content or "" for reply in await asyncio.gather(*calls)]

    assert len(set(asyncio.run(ask_all()))) == 20


@pytest.mark.parametrize(
    ("asked", "raised", "code"),
    [
        ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
        ({"functions": [{"name": "weather"}]}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"aft": {"num_layer": 1}}}, openai.BadRequestError, "unknown_parameter"),
        (
            {"messages": saying("word " * 18_000)},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        ({"messages": saying("x" * 200_000)}, openai.APIStatusError, "body_too_large"),
        ({"model": "gpt-4o"}, openai.NotFoundError, "model_not_found"),
        ({"n": 5}, openai.InternalServerError, "engine_error"),
        ({"extra_body": {"aft": {"deadline_s": 0.001}}}, openai.InternalServerError, "deadline_exceeded"),
        (
            {"extra_body": {"aft": {"num_proposals": 5, "quorum": 5}}},
            openai.InternalServerError,
            "quorum_not_met",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_an_error_is_the_clients_own_class_with_code_and_request_id(
    stock: openai.OpenAI, asked: dict[str, Any], raised: type[openai.APIStatusError], code: str | None
) -> None:
    with pytest.raises(raised) as caught:
        stock.chat.completions.create(**{"model": "aft", "messages": USER, **asked})
    assert caught.value.code == code
    assert caught.value.request_id
    assert isinstance(caught.value.body, dict) and caught.value.body["message"] in caught.value.message


def test_an_error_in_a_stream_is_raised_where_it_is_read(stock: openai.OpenAI) -> None:
    stream = stock.chat.completions.create(
        model="aft", messages=USER, stream=True, extra_body={"aft": {"num_proposals": 5, "quorum": 5}}
    )
    with pytest.raises(openai.APIError, match="answers usable"):
        list(stream)


def test_a_client_that_is_impatient_gets_its_timeout_error(url: str) -> None:
    with (
        openai.OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=0.01) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(model="aft", messages=USER)


def recipe() -> str:
    """Return the LiteLLM configuration in docs/serving.md."""
    [block] = [b for b in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S) if "litellm_params" in b]
    return str(block)


def test_the_litellm_recipe_names_this_servers_models() -> None:
    models = [entry["litellm_params"]["model"] for entry in yaml.safe_load(recipe())["model_list"]]
    assert models == ["openai/aft", "openai/aft@k5-l2"]


@contextmanager
def litellm_proxy(url: str, folder: Path) -> Iterator[str]:
    """Start LiteLLM's proxy with the recipe's configuration, in front of `url`."""
    assert LITELLM is not None
    config = folder / "litellm.yaml"
    config.write_text(recipe().replace("http://127.0.0.1:8000/v1", url))
    port = free_port("127.0.0.1")
    # Its defaults look for updates and price lists; nothing of this test leaves the machine.
    environment = {
        "LITELLM_MASTER_KEY": MASTER_KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_TELEMETRY": "False",
        "PYTHONPATH": "",
    }
    log = (folder / "litellm.log").open("w")
    proxy = subprocess.Popen(
        [LITELLM, "--config", str(config), "--port", str(port), "--host", "127.0.0.1"],
        env=os.environ | environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        end = time.monotonic() + 180
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).is_success:
                    break
            except httpx.HTTPError:
                assert proxy.poll() is None and time.monotonic() < end, (folder / "litellm.log").read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        proxy.terminate()
        proxy.wait(timeout=60)
        log.close()


@pytest.mark.skipif(LITELLM is None, reason="no litellm on PATH; AFT_RAY_LITELLM may name that of another venv")
def test_litellm_in_front_answers_streams_and_passes_plans_and_errors_on(url: str, tmp_path: Path) -> None:
    with (
        litellm_proxy(url, tmp_path) as proxy,
        openai.OpenAI(base_url=proxy, api_key=MASTER_KEY, max_retries=0) as client,
    ):
        plain: Any = client.chat.completions.create(model="aft", messages=USER, seed=5)
        assert len((plain.choices[0].message.content or "").split()) == 8
        chunks = client.chat.completions.create(model="aft", messages=USER, seed=5, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == plain.choices[0].message.content
        assert len([piece for piece in pieces if piece]) > 1
        single = client.chat.completions.create(model="aft", messages=USER, extra_body={"aft": {"num_layers": 0}})
        assert single.usage and plain.usage and single.usage.completion_tokens == 8 < plain.usage.completion_tokens
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="aft", messages=USER, temperature=3)
