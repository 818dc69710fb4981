"""The cost of the endpoint over its engines: latency, critical path, throughput limit, and placement of drafts.

    python benchmarks/serving.py [--parts added path ceiling placement] [--rounds 3]

added       one client, L=0, a scripted engine of 8 tokens in 40 ms: time over HTTP minus time of the bare engine (ms,
            p50, p99); and the same for Serve alone: two deployments and one streamed call of 40 ms
path        one client, K=5, L=1, scripted: time over HTTP / critical path (32 + 32 tokens of 10 ms)
ceiling     64 clients, L=0, a scripted engine that answers at once: requests/s with 1 and 2 ingress replicas. Two
            cores, which the clients share, are too few for 2 replicas to help; on a larger machine pass
            --ingress 1 2 4 8
placement   K=4 drafts of one prompt, SmolLM2 on two transformers replicas of one core each: four drafts on one replica
            (the prompt is computed once) / two on each (computed twice, in parallel), alone and with 6 clients

It measures Serve's other transports where the variables of docs/operations.md select them. With HAProxy, set
RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=0 as well, or each server takes half a minute to end.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from aft_ray.config import (
    AdmissionConfig,
    ReplicaConfig,
    ScriptedEngineConfig,
    ServingConfig,
    TransformersEngineConfig,
)
from aft_ray.engines import EngineEvent, GenerateRequest, Sample, Sampling
from aft_ray.engines.scripted import ScriptedEngine
from aft_ray.fan_in import Emit, Writer, fan_in
from aft_ray.inference import Plan
from aft_ray.serving import serve_app, stop
from aft_ray.serving.app import quiet_logs
from aft_ray.serving.handle_engine import HandleEngine

APP = "bench"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
NUM_TOKENS, SECONDS_PER_TOKEN = 8, 0.005
TINY = ReplicaConfig(num_cpus=0.1, max_ongoing_requests=1000)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def times(number: int, once: Callable[[], Coroutine[Any, Any, Any]]) -> list[float]:
    """Return the seconds of each of `number` calls in sequence, after a tenth as many to warm up."""
    found = []
    for _ in range(number + number // 10):
        began = time.perf_counter()
        await once()
        found.append(time.perf_counter() - began)
    return found[number // 10 :]


def served(engine: ScriptedEngineConfig, **settings: Any) -> str:
    config = ServingConfig(engine=engine, port=0, proposer=TINY, **{"ingress": TINY, **settings})
    return serve_app(config, name=APP)


async def bare(engine: ScriptedEngine, max_tokens: int) -> None:
    request = GenerateRequest(
        request_id="bare", prompt_ids=(), messages=tuple(MESSAGES), sampling=Sampling(max_tokens=max_tokens), seeds=(1,)
    )
    async with aclosing(engine.generate(request)) as events:
        async for _ in events:
            pass


async def asked(client: httpx.AsyncClient, **aft: Any) -> None:
    response = await client.post(CHAT, json={"messages": MESSAGES, "aft": aft})
    response.raise_for_status()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class NoEngine:
    """A replica that sends what an engine replica sends when nobody reads its deltas: first token and answer."""

    async def items(self) -> AsyncGenerator[int, None]:
        for number in range(NUM_TOKENS):
            await asyncio.sleep(SECONDS_PER_TOKEN)
            if number in (0, NUM_TOKENS - 1):
                yield number


NO_API = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(NO_API)
class NoIngress:
    """Return the time that Serve itself adds to a request through two deployments."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self.items = engine.options(stream=True).items

    @NO_API.post("/")
    async def answer(self, body: dict[str, Any]) -> int:
        return sum([number async for number in self.items.remote()])


async def added(rounds: int) -> None:
    engine = ScriptedEngineConfig(num_tokens=NUM_TOKENS, seconds_per_token=SECONDS_PER_TOKEN)
    url = served(engine)
    serve.run(NoIngress.bind(NoEngine.bind()), name="nothing", route_prefix="/nothing", logging_config=quiet_logs())
    print("added latency at L=0, ms      p50    p99     Serve alone, ms      p50    p99", flush=True)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(rounds):
            alone = await times(200, lambda: bare(ScriptedEngine(engine), 64))
            over = await times(200, lambda: asked(client, num_layers=0))
            nothing = await times(200, lambda: client.post("/nothing/", json={"messages": MESSAGES}))
            shares = (0.5, 0.99)
            rows = [1000 * (quantile(over, share) - quantile(alone, share)) for share in shares]
            rows += [1000 * (quantile(nothing, share) - quantile(alone, share)) for share in shares]
            print("{:>33.1f} {:>6.1f} {:>26.1f} {:>6.1f}".format(*rows), flush=True)
    serve.delete("nothing")
    stop(APP)


async def path(rounds: int) -> None:
    short = Sampling(max_tokens=64)
    engine = ScriptedEngineConfig(num_tokens=32, seconds_per_token=0.01)
    url = served(engine, plan=Plan(proposal=short, aggregation=(short,), final=short))
    print("K=5, L=1: seconds over HTTP / critical path", flush=True)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for _ in range(rounds):
            critical = 2 * statistics.median(await times(10, lambda: bare(ScriptedEngine(engine), 64)))
            over = statistics.median(await times(20, lambda: asked(client, num_proposals=5, num_layers=1)))
            print(f"    {over:.3f} / {critical:.3f} = {over / critical:.2f}  (goal <= 1.15)", flush=True)
    stop(APP)


async def ceiling(rounds: int, ingress: list[int]) -> None:
    print("ingress replicas   requests/s   over one", flush=True)
    rates: dict[int, list[float]] = {number: [] for number in ingress}
    for _ in range(rounds):
        for number in ingress:
            replicas = TINY.model_copy(update={"min_replicas": number, "max_replicas": number})
            url = served(
                ScriptedEngineConfig(num_tokens=1), ingress=replicas, admission=AdmissionConfig(max_requests=None)
            )
            rates[number].append(await rate(url, clients=64, seconds=8))
            stop(APP)
            first = rates[ingress[0]][-1]
            print(f"{number:>16} {rates[number][-1]:>12.0f} {rates[number][-1] / first:>10.2f}", flush=True)


async def rate(url: str, clients: int, seconds: float) -> float:
    """Return the answers per second of clients that send requests without pause."""
    done = 0

    async def keep_asking(client: httpx.AsyncClient, until: float) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await asked(client, num_layers=0)
            done += 1

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(keep_asking(client, time.perf_counter() + 2) for _ in range(clients)))
        done, began = 0, time.perf_counter()
        await asyncio.gather(*(keep_asking(client, began + seconds) for _ in range(clients)))
        return done / (time.perf_counter() - began)


@dataclasses.dataclass
class Spread:
    """Sends the samples of a request as two requests, which Serve routes to the replicas with the shorter queues."""

    engine: HandleEngine

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineEvent, None]:
        half = len(request.seeds) // 2
        parts = (request.seeds[:half], request.seeds[half:])
        writers = [
            self._writer(dataclasses.replace(request, request_id=f"{request.request_id}/{n}", seeds=seeds))
            for n, seeds in enumerate(parts)
        ]
        async with aclosing(fan_in(writers)) as events:
            async for event in events:
                yield event

    def _writer(self, request: GenerateRequest) -> Writer[EngineEvent]:
        async def write(emit: Emit[EngineEvent]) -> None:
            async for event in self.engine.generate(request):
                emit(event)

        return write


async def placement(rounds: int) -> None:
    from aft_ray.templates import ChatFormat

    engine_config = TransformersEngineConfig(model="smollm2-135m-instruct", dtype="bfloat16")
    replicas = ReplicaConfig(num_cpus=1, min_replicas=2, max_replicas=2)
    config = ServingConfig(engine=engine_config, port=0, ingress=TINY, proposer=replicas, max_tokens=4096)
    serve_app(config, name=APP)
    together = await HandleEngine.connect(serve.get_deployment_handle("Engine", app_name=APP))
    assert together.info.tokenizer is not None
    prompts = ChatFormat.load(together.info.tokenizer)
    engines = {"one replica": together, "two and two": Spread(together)}
    counter = 0

    async def drafts(engine: Any, words: int) -> int:
        nonlocal counter
        counter += 1
        messages = ({"role": "user", "content": f"{counter} " + "Tell me of rivers and seas. " * words},)
        request = GenerateRequest(
            request_id=f"place-{counter}", prompt_ids=prompts.prompt_ids(messages), messages=messages,
            sampling=Sampling(temperature=0.7, top_k=50, max_tokens=32), seeds=(1, 2, 3, 4),
        )  # fmt: skip
        return sum([event.num_tokens async for event in engine.generate(request) if isinstance(event, Sample)])

    for _ in range(4):
        await asyncio.gather(*(drafts(engine, 10) for engine in engines.values()))  # both replicas are warm
    print("prompt tokens  clients   one replica   two and two   (tokens/s)   two and two / one replica", flush=True)
    for words in (10, 120):
        for clients in (1, 6):
            for _ in range(rounds):
                rates = {}
                for name, engine in engines.items():
                    began = time.perf_counter()
                    tokens = sum(await asyncio.gather(*(drafts(engine, words) for _ in range(clients))))
                    rates[name] = tokens / (time.perf_counter() - began)
                one, two = rates.values()
                length = prompts.count(({"role": "user", "content": "Tell me of rivers and seas. " * words},))
                print(f"{length:>13} {clients:>8} {one:>13.1f} {two:>13.1f} {two / one:>28.2f}", flush=True)
    stop(APP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"added": added, "path": path, "placement": placement}
    names = ("added", "path", "ceiling", "placement")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ingress", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    for part in arguments.parts:
        if part == "ceiling":
            asyncio.run(ceiling(arguments.rounds, arguments.ingress))
        else:
            asyncio.run(parts[part](arguments.rounds))
    ray.shutdown()


if __name__ == "__main__":
    main()
