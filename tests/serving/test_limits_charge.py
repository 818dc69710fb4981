"""What a key is charged is what the engines were asked to read and wrote, by their own books."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from aft_ray.config import ScriptedEngineConfig
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.inference.plan import Plan
from aft_ray.serving.http.api import make_api
from aft_ray.serving.limits.keys import digest
from tests.serving.test_ingress import service_over

LIMIT = 1_000_000
WORDS = " ".join(f"word{number}" for number in range(400))


def charged(tmp_path: Path, engine: ScriptedEngineConfig, body: dict[str, Any]) -> tuple[int, int, dict[str, str]]:
    """Return the tokens that a request was charged, those in the engine's books, and the headers of its answer."""
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"alice: {{sha256: {digest('secret')}, max_requests: 3, tokens_per_minute: {LIMIT}}}")
    scripted = ScriptedEngine(engine)
    served = service_over(scripted, Plan(num_proposals=8), keys_file=str(keys), max_num_proposals=16)
    headers = {"authorization": "Bearer secret"}

    told: list[int] = []
    is_told = asyncio.Event()
    ask = served.gate.ask

    async def listening(method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "release":
            told.append(args[2])
            is_told.set()
        return await ask(method, *args, **kwargs)

    async def run() -> httpx.Response:
        served.gate.ask = listening
        transport = httpx.ASGITransport(make_api(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            messages = [{"role": "user", "content": WORDS}]
            reply = await client.post("/v1/chat/completions", json={"messages": messages, **body}, timeout=60)
            await is_told.wait()
            return reply

    reply = asyncio.run(run())
    assert reply.status_code == 200, reply.text
    return sum(told), scripted.num_prompt_tokens + scripted.num_tokens, dict(reply.headers)


@pytest.mark.parametrize(
    ("engine", "aft"),
    [
        ({}, {"num_layers": 1}),
        ({}, {"num_layers": 3, "subset_size": 3}),
        ({"slow_on": (0, 1), "seconds_per_token": 0.02, "slow_factor": 12}, {"num_layers": 1, "hedge_s": 1.0}),
    ],
    ids=["plain", "deep", "hedged"],
)
def test_a_key_is_charged_what_the_engine_was_asked_to_do(
    tmp_path: Path, engine: dict[str, Any], aft: dict[str, Any]
) -> None:
    used, booked, headers = charged(tmp_path, ScriptedEngineConfig(num_tokens=8, **engine), {"aft": aft})
    assert booked > 9 * 400
    assert used == booked
    assert headers["x-ratelimit-limit-requests"] == "3"
    assert headers["x-ratelimit-remaining-requests"] == "2"
    assert headers["x-ratelimit-limit-tokens"] == str(LIMIT)
    assert 0 < int(headers["x-ratelimit-remaining-tokens"]) < LIMIT
    assert headers["x-ratelimit-reset-tokens"].endswith("s")
