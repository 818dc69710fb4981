"""Load on the endpoint while its engine replicas are killed: what the clients get, and what stays behind.

    python benchmarks/serving_load.py [--topology shared|split] [--minutes 5] [--clients 200] [--kill-every 8]
                                      [--json FILE]

It runs a scripted engine on three aggregator replicas (split: and three proposer replicas) behind two ingress replicas,
over real HTTP. Clients send requests without
pause: plain and streamed, single samples and up to two layers; one in ten disconnects early. A random engine replica is
killed every `--kill-every` seconds, and once the actor that keeps the limits. It exits with 1 unless all of this holds:

    every request ends with an answer or an error object of the API, within its deadline and the client's grace
    no engine replica has unfinished samples, no request counts as open, and no coroutines have accumulated
    the memory of the ingress replicas has not grown by more than a tenth since the first third
    the ledger has one line for every request that was admitted
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import ray
from ray import serve

from aft_ray.config import AdmissionConfig, ReplicaConfig, ScriptedEngineConfig, ServingConfig
from aft_ray.engines import Sampling
from aft_ray.inference import Plan
from aft_ray.serving import serve_app, stop
from aft_ray.serving.app import prepare_for_serving
from aft_ray.serving.errors import HttpError

APP = "load"
DEADLINE_S = 60.0
"""Deadline of every request, in seconds."""
GRACE_S = 10.0
"""Seconds that a reply may take beyond it, since server and clients share two busy cores."""
CHAT = "/v1/chat/completions"


@dataclass(kw_only=True)
class Outcomes:
    """The replies that the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number of replies by kind: `answered`, `left`, an error code. `untyped` and `late` ones are failures."""
    seconds: list[float] = field(default_factory=list)
    num_killed: int = 0
    examples: list[str] = field(default_factory=list)
    """Examples of failures."""

    def failure(self, kind: str, what: str) -> None:
        self.counts[kind] += 1
        if len(self.examples) < 10:
            self.examples.append(f"{kind}: {what[:300]}")


def config(folder: Path, clients: int, topology: Literal["shared", "split"]) -> ServingConfig:
    short = Sampling(max_tokens=32)
    engines = ReplicaConfig(num_cpus=0.1, min_replicas=3, max_replicas=3, max_ongoing_requests=500)
    return ServingConfig(
        engine=ScriptedEngineConfig(num_tokens=16, seconds_per_token=0.02, slow_on=(4,), slow_factor=3),
        plan=Plan(proposal=short, aggregation=(short,), final=short),
        port=0,
        ingress=ReplicaConfig(num_cpus=0.1, min_replicas=2, max_replicas=2),
        topology=topology,
        aggregator=engines,
        proposer=engines if topology == "split" else ReplicaConfig(),
        admission=AdmissionConfig(max_requests=max(2, clients * 3 // 4)),
        ledger=str(folder),
    )


def body(rng: random.Random) -> dict[str, Any]:
    plan = {"num_proposals": rng.randint(2, 5), "num_layers": rng.randint(0, 2), "deadline_s": DEADLINE_S}
    return {
        "messages": [{"role": "user", "content": f"Question {rng.random()}"}],
        "stream": rng.random() < 0.4,
        "aft": plan,
    }


async def keep_asking(client: httpx.AsyncClient, number: int, until: float, outcomes: Outcomes) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        request, patience = body(rng), rng.uniform(0.05, 1.0) if rng.random() < 0.1 else None
        began = time.monotonic()
        wait_s = 0.0
        try:
            async with asyncio.timeout(patience or DEADLINE_S + GRACE_S):
                wait_s = await ask(client, request, outcomes)
        except TimeoutError:
            if patience is not None:
                outcomes.counts["left"] += 1
            else:
                outcomes.failure("late", f"{time.monotonic() - began:.1f} s, {request['aft']}")
        except httpx.HTTPError as error:
            outcomes.failure("untyped", f"{type(error).__name__}: {error}")
        outcomes.seconds.append(time.monotonic() - began)
        await asyncio.sleep(wait_s * rng.random())


async def ask(client: httpx.AsyncClient, request: dict[str, Any], outcomes: Outcomes) -> float:
    """Send one request; return the seconds after which the server asks for the next one."""
    if request["stream"]:
        async with client.stream("POST", CHAT, json=request) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                return judge_error(response, response.text, outcomes)
            lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
        judge_stream(lines, outcomes)
        return 0.0
    response = await client.post(CHAT, json=request)
    if response.status_code == httpx.codes.OK:
        outcomes.counts["answered" if response.json()["choices"][0]["message"]["content"] else "untyped"] += 1
        return 0.0
    return judge_error(response, response.text, outcomes)


def judge_stream(lines: list[str], outcomes: Outcomes) -> None:
    """Check that a stream ends with [DONE], after a finish reason or an error object."""
    if not lines or lines[-1] != "data: [DONE]":
        outcomes.failure("untyped", f"a stream without [DONE]: {lines[-1:]}")
        return
    last = json.loads(lines[-2].removeprefix("data: "))
    if "error" in last:
        outcomes.counts[last["error"]["code"]] += 1
    elif last["choices"][0]["finish_reason"]:
        outcomes.counts["answered"] += 1
    else:
        outcomes.failure("untyped", f"a stream without an end: {lines[-2]}")


def judge_error(response: httpx.Response, text: str, outcomes: Outcomes) -> float:
    try:
        outcomes.counts[str(json.loads(text)["error"]["code"])] += 1
    except (ValueError, KeyError, TypeError):
        outcomes.failure("untyped", f"status {response.status_code}: {text}")
    return float(response.headers.get("retry-after", 0))


async def keep_killing(every_s: float, until: float, outcomes: Outcomes, pools: Sequence[str]) -> None:
    """Kill an engine replica every few seconds and, half-way, once the actor that keeps the limits."""
    rng, half, control_killed = random.Random(0), time.monotonic() + (until - time.monotonic()) / 2, False
    while time.monotonic() + every_s < until:
        await asyncio.sleep(every_s)
        words: tuple[str, ...] = tuple(f"SERVE_REPLICA::{APP}#{pool}" for pool in pools)
        if time.monotonic() > half and not control_killed:
            words, control_killed = ("::control",), True
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = [actor for actor in actors if any(word in actor["name"] for word in words)]
        if names:
            victim = rng.choice(names)
            with contextlib.suppress(ValueError):  # it is gone already, and not yet off the list
                ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
                outcomes.num_killed += 1


async def states(deployment: str) -> dict[int, Any]:
    """Return the state of every replica of a deployment by process."""
    replies = await serve.get_deployment_handle(deployment, app_name=APP).broadcast("activity").results_async()
    found = [reply if isinstance(reply, dict) else vars(reply) for reply in replies]
    return {activity["process_id"]: activity for activity in found}


def memory_mib(processes: dict[int, Any]) -> float:
    return sum(psutil.Process(pid).memory_info().rss for pid in processes) / 2**20


async def run(
    url: str, minutes: float, clients: int, kill_every_s: float, pools: Sequence[str]
) -> tuple[Outcomes, dict[str, Any]]:
    outcomes = Outcomes()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        ingress = await states("Ingress")
        tasks_before = sum(activity["num_tasks"] for activity in ingress.values())
        until = time.monotonic() + 60 * minutes
        asking = [asyncio.create_task(keep_asking(client, n, until, outcomes)) for n in range(clients)]
        killing = asyncio.create_task(keep_killing(kill_every_s, until, outcomes, pools))
        await asyncio.sleep(20 * minutes)
        memory_early = memory_mib(ingress)
        await asyncio.gather(*asking, killing)
    left = await what_is_left(tasks_before, pools)
    return outcomes, left | {"memory_growth": memory_mib(ingress) / memory_early, "ingress_mib": memory_mib(ingress)}


async def what_is_left(tasks_before: int, pools: Sequence[str]) -> dict[str, Any]:
    """Ask for the open requests until there are none, for at most half a minute."""
    ingress = serve.get_deployment_handle("Ingress", app_name=APP)
    for _ in range(4):  # each time waits for it as long as a request would
        with contextlib.suppress(HttpError):
            await ingress.num_open.remote()
            break
    end = time.monotonic() + 30
    while True:
        tasks = sum(activity["num_tasks"] for activity in (await states("Ingress")).values())
        left = {
            "open_requests": await ingress.num_open.remote(),
            "samples": sum([a["num_samples"] for pool in pools for a in (await states(pool)).values()]),
            "more_tasks": max(0, tasks - tasks_before),
        }
        if time.monotonic() > end or (not any(left.values())):
            return left
        await asyncio.sleep(1)


def problems(outcomes: Outcomes, left: dict[str, Any], num_lines: int) -> list[str]:
    """Return the conditions that did not hold."""
    counts = outcomes.counts
    refused = counts["rate_limit_exceeded"] + counts["unavailable"]
    ended = counts.total() - refused - counts["left"]
    found = [f"{counts[kind]} requests {kind}" for kind in ("untyped", "late") if counts[kind]]
    found += [f"{left[what]} {what} left" for what in ("open_requests", "samples") if left[what]]
    if left["more_tasks"] > 20:
        found.append(f"{left['more_tasks']} coroutines left in the ingress replicas")
    if left["memory_growth"] > 1.1:
        found.append(f"the ingress replicas' memory grew by {left['memory_growth'] - 1:.0%}")
    if not ended <= num_lines <= ended + counts["left"]:
        found.append(f"the ledger has {num_lines} lines for {ended} requests that ended and {counts['left']} left")
    if not counts["answered"]:
        found.append("nothing was answered: this run shows nothing")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=["shared", "split"], default="shared")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--kill-every", type=float, default=8, metavar="SECONDS")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    prepare_for_serving()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    with tempfile.TemporaryDirectory() as folder:
        pools = ["Aggregator", "Proposer"] if arguments.topology == "split" else ["Aggregator"]
        url = serve_app(config(Path(folder), arguments.clients, arguments.topology), name=APP)
        outcomes, left = asyncio.run(run(url, arguments.minutes, arguments.clients, arguments.kill_every, pools))
        lines = [line for file in Path(folder).glob("*.jsonl") for line in file.read_text().splitlines()]
        stop(APP)
    ray.shutdown()
    seconds = sorted(outcomes.seconds)
    numbers = {
        "topology": arguments.topology,
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "outcomes": dict(outcomes.counts),
        "killed": outcomes.num_killed,
        "requests_per_second": round(outcomes.counts.total() / (60 * arguments.minutes), 1),
        "p50_s": round(seconds[len(seconds) // 2], 3),
        "p99_s": round(seconds[len(seconds) * 99 // 100], 3),
        "ledger_lines": len(lines),
        **left,
        "problems": problems(outcomes, left, len(lines)),
        "examples": outcomes.examples,
    }
    print(json.dumps(numbers, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers))
    return 1 if numbers["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
