"""The cost of the endpoint over its engines: latency, critical path, throughput limit, and placement of drafts.

    python benchmarks/serving.py [--parts added path ceiling placement] [--rounds 3] [--beside-llm]

added       one client, L=0, a scripted engine of 8 tokens in 40 ms: time over HTTP minus time of the bare engine (ms,
            p50, p99); and the same for Serve alone: two deployments and one streamed call of 40 ms that yields once
path        one client, K=5, L=1, scripted: time over HTTP / critical path (32 + 32 tokens of 10 ms)
ceiling     64 clients, L=0, a scripted engine that answers at once: requests/s with 1 and 2 ingress replicas, beside
            those of Serve alone. Two cores, which the clients share, are too few for 2 replicas to help; on a larger
            machine pass --ingress 1 2 4 8
placement   K=4 drafts of one prompt, SmolLM2 on two transformers replicas of one core each: four drafts on one replica
            (the prompt is computed once) / two on each (computed twice, in parallel), alone and with 6 clients

Serve alone is an application of two deployments that does nothing but one streamed call. `--beside-llm` also measures
Ray Serve LLM's own application (`ray.serve.llm.build_openai_app`) with an engine that sleeps as long.

It measures Serve's other transports where the variables of docs/operations.md select them. With HAProxy, set
RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=0 as well, or each server takes half a minute to end.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import statistics
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
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
from aft_ray.models import resolve_model
from aft_ray.serving import serve_app, stop
from aft_ray.serving.app import prepare_for_serving
from aft_ray.serving.deployments import quiet_logs
from aft_ray.serving.handle_engine import HandleEngine
from aft_ray.serving.replica_calls import by_own_transport

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


async def times_in_turn(number: int, kinds: Sequence[Callable[[], Coroutine[Any, Any, Any]]]) -> list[list[float]]:
    """Return the seconds of each of `number` calls of every kind, in turns, so that all see the same machine."""
    found: list[list[float]] = [[] for _ in kinds]
    for _ in range(number + number // 10):
        for kind, seconds in zip(kinds, found, strict=True):
            seconds += await times(1, kind)
    return [seconds[number // 10 :] for seconds in found]


def served(engine: ScriptedEngineConfig, **settings: Any) -> str:
    config = ServingConfig(engine=engine, port=0, aggregator=TINY, **{"ingress": TINY, **settings})
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


async def nothing_asked(client: httpx.AsyncClient, seconds_per_token: float) -> None:
    response = await client.post("/nothing/", json={"messages": MESSAGES, "seconds_per_token": seconds_per_token})
    response.raise_for_status()


def serve_nothing() -> None:
    serve.run(NoIngress.bind(NoEngine.bind()), name="nothing", route_prefix="/nothing", logging_config=quiet_logs())


async def llm_asked(client: httpx.AsyncClient, seconds_per_token: float) -> None:
    body = {"model": "sleeping", "messages": MESSAGES, "user": str(seconds_per_token)}
    response = await client.post("/llm/v1/chat/completions", json=body)
    response.raise_for_status()


def serve_llm() -> None:
    """Start Ray Serve LLM's own application: an OpenAI ingress and a server, with an engine that only sleeps."""
    from ray.serve.llm import LLMConfig, build_openai_app

    options = {"autoscaling_config": None, "num_replicas": 1, "max_ongoing_requests": 1000}
    options |= {"ray_actor_options": {"num_cpus": 0.1}}
    config = LLMConfig(
        model_loading_config={"model_id": "sleeping", "model_source": resolve_model("smollm2-135m-instruct")},
        deployment_config=options,
        accelerator_type=None,
    )
    app = build_openai_app({"llm_configs": [config], "ingress_deployment_config": options})
    serve.run(app, name="llm", route_prefix="/llm", logging_config=quiet_logs())


def stop_all() -> None:
    for name in {"nothing", "llm"} & set(serve.status().applications):
        serve.delete(name)
    stop(APP)


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
class NoEngine:
    """A replica that sends what an aggregator replica sends of a reply in one piece: the answer."""

    async def items(self, seconds_per_token: float) -> AsyncGenerator[int, None]:
        for _ in range(NUM_TOKENS if seconds_per_token else 0):
            await asyncio.sleep(seconds_per_token)
        yield NUM_TOKENS


NO_API = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
@serve.ingress(NO_API)
class NoIngress:
    """Return the time that Serve itself adds to a request through two deployments."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self.items = by_own_transport(engine).options(stream=True).items

    @NO_API.post("/")
    async def answer(self, body: dict[str, Any]) -> int:
        return sum([number async for number in self.items.remote(body["seconds_per_token"])])


async def added(rounds: int, beside_llm: bool) -> None:
    engine = ScriptedEngineConfig(num_tokens=NUM_TOKENS, seconds_per_token=SECONDS_PER_TOKEN)
    url = served(engine)
    serve_nothing()
    print("time over HTTP minus that of the bare engine, L=0, ms: p50 (p99); over Serve alone, p50", flush=True)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        kinds: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "endpoint": lambda: asked(client, num_layers=0),
            "Serve alone": lambda: nothing_asked(client, SECONDS_PER_TOKEN),
        }
        if beside_llm:
            serve_llm()
            kinds["Ray Serve LLM"] = lambda: llm_asked(client, SECONDS_PER_TOKEN)
        for _ in range(rounds):
            alone, *others = await times_in_turn(200, [lambda: bare(ScriptedEngine(engine), 64), *kinds.values()])
            nothing = quantile(others[1], 0.5)
            for name, seconds in zip(kinds, others, strict=True):
                p50, p99 = (1000 * (quantile(seconds, share) - quantile(alone, share)) for share in (0.5, 0.99))
                over = 1000 * (quantile(seconds, 0.5) - nothing)
                print(f"    {name:14} {p50:6.1f} ({p99:.1f}) {over:6.1f}", flush=True)
    stop_all()


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


async def ceiling(rounds: int, ingress: list[int], beside_llm: bool) -> None:
    print("requests/s with 64 clients, and over those of Serve alone", flush=True)
    for number in ingress:
        replicas = TINY.model_copy(update={"min_replicas": number, "max_replicas": number})
        admission = AdmissionConfig(max_requests=None)
        url = served(ScriptedEngineConfig(num_tokens=1), ingress=replicas, admission=admission)
        serve_nothing()
        kinds: dict[str, Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]] = {
            f"endpoint, {number} ingress replicas": lambda client: asked(client, num_layers=0),
            "Serve alone": lambda client: nothing_asked(client, 0),
        }
        if beside_llm:
            serve_llm()
            kinds["Ray Serve LLM"] = lambda client: llm_asked(client, 0)
        for _ in range(rounds):
            # they take turns of a few seconds, so that they see the same machine
            rates = [[await rate(url, 64, 3, ask) for ask in kinds.values()] for _ in range(3)]
            found = dict(zip(kinds, map(statistics.median, zip(*rates, strict=True)), strict=True))
            for name, median in found.items():
                print(f"    {name:29} {median:6.0f} {median / found['Serve alone']:6.2f}", flush=True)
        stop_all()


async def rate(
    url: str, clients: int, seconds: float, ask: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]
) -> float:
    """Return the answers per second of clients that send requests without pause."""
    done = 0

    async def keep_asking(client: httpx.AsyncClient, until: float) -> None:
        nonlocal done
        while time.perf_counter() < until:
            await ask(client)
            done += 1

    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(keep_asking(client, time.perf_counter() + 1) for _ in range(clients)))
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
    from aft_ray.templates.loading import load_format

    engine_config = TransformersEngineConfig(model="smollm2-135m-instruct", dtype="bfloat16")
    replicas = ReplicaConfig(num_cpus=1, min_replicas=2, max_replicas=2)
    config = ServingConfig(engine=engine_config, port=0, ingress=TINY, aggregator=replicas, max_tokens=4096)
    serve_app(config, name=APP)
    together = await HandleEngine.connect(serve.get_deployment_handle("Aggregator", app_name=APP))
    assert together.info.tokenizer is not None
    prompts = load_format(together.info)
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
    parts = {"path": path, "placement": placement}
    names = ("added", "path", "ceiling", "placement")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside-llm", action="store_true", help="also measure Ray Serve LLM's own application")
    parser.add_argument("--ingress", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    prepare_for_serving()
    os.environ.setdefault("RAY_worker_niceness", "0")  # as `aft-ray` does for its own clusters
    os.environ.setdefault("RAYLLM_VLLM_ENGINE_CLS", "serve_llm_engine.SleepingEngine")
    num_gpus = 1 if arguments.beside_llm else 0  # Ray Serve LLM asks for one, which its engine does not use
    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=num_gpus,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    for part in arguments.parts:
        if part == "ceiling":
            asyncio.run(ceiling(arguments.rounds, arguments.ingress, arguments.beside_llm))
        elif part == "added":
            asyncio.run(added(arguments.rounds, arguments.beside_llm))
        else:
            asyncio.run(parts[part](arguments.rounds))
    ray.shutdown()


if __name__ == "__main__":
    main()
