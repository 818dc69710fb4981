"""The endpoint when its engine is the limit: its tokens/s over those of `vllm serve` with the same engine.

    python benchmarks/serving_saturation.py [--engine-cores 1] [--rounds 3] [--clients 24]

The clients ask four questions each in sequence, with answers of 64 tokens: SmolLM2 on one vLLM engine, L=0. As on a
machine with an accelerator, the engine has its own cores (the last `--engine-cores`), and everything else, clients
included, runs on the others. With 0, everything shares all cores. The goal is 0.95. The servers run one after the
other, and the first round of each is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import ray
import torch

from aft_ray.config import ReplicaConfig, ServingConfig, VllmEngineConfig
from aft_ray.cpu import dtype_to_load
from aft_ray.models import resolve_model
from aft_ray.serving import serve_app, stop
from aft_ray.serving.app import free_port

APP = "bench"
NUM_QUESTIONS, NUM_TOKENS = 4, 64
ON_GPU = torch.cuda.is_available()
VLLM = VllmEngineConfig(
    model="smollm2-135m-instruct",
    max_model_len=1024,
    max_num_seqs=256 if ON_GPU else 32,
    seeds=False,
    max_lora_rank=0,
)


def place(num_engine_cores: int) -> None:
    """Pin vLLM's threads to the engine's cores, and this process and its children to the others."""
    cores = sorted(os.sched_getaffinity(0))
    own, others = (cores[-num_engine_cores:], cores[:-num_engine_cores]) if num_engine_cores else (cores, cores)
    if not others:
        raise SystemExit(f"--engine-cores {num_engine_cores}: none of the {len(cores)} cores is left for the servers")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in own)
    os.sched_setaffinity(0, others)


@contextlib.contextmanager
def vllm_serve() -> Iterator[str]:
    """Start vLLM's own server."""
    port = free_port("127.0.0.1")
    settings = {
        "--model": resolve_model(VLLM.model), "--served-model-name": "vllm", "--port": str(port), "--host": "127.0.0.1",
        "--max-model-len": str(VLLM.max_model_len), "--max-num-seqs": str(VLLM.max_num_seqs),
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    if not ON_GPU:  # as our engine does on a CPU
        settings |= {"--dtype": dtype_to_load(VLLM.dtype, "cpu"), "--block-size": "32"}
        command.append("--enforce-eager")
    server = subprocess.Popen(
        [*command, *(word for pair in settings.items() for word in pair)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=5).is_success:
                    break
            if server.poll() is not None:
                raise SystemExit(f"vllm serve ended with {server.returncode}")
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


@contextlib.contextmanager
def endpoint() -> Iterator[str]:
    """Start our server, with one ingress replica."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ingress = ReplicaConfig(num_cpus=0.1, max_ongoing_requests=1000)
    config = ServingConfig(engine=VLLM, port=0, ingress=ingress, aggregator=ReplicaConfig(num_cpus=1))
    yield serve_app(config, name=APP)
    stop(APP)
    ray.shutdown()


async def tokens_per_second(url: str, model: str, number: int, num_clients: int) -> float:
    """Run one round. `number` makes its questions new."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:

        async def client(which: int) -> int:
            tokens = 0
            for question in range(NUM_QUESTIONS):
                content = f"Write a long story about the number {number * 1000 + which * NUM_QUESTIONS + question}."
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": NUM_TOKENS, "temperature": 0.7, "top_k": 50, "top_p": 1.0,
                }  # fmt: skip
                response = await http.post("/v1/chat/completions", json=body)
                response.raise_for_status()
                tokens += int(response.json()["usage"]["completion_tokens"])
            return tokens

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(client(which) for which in range(num_clients))))
        return tokens / (time.perf_counter() - began)


def rates(url: str, model: str, num_rounds: int, num_clients: int) -> list[float]:
    return [asyncio.run(tokens_per_second(url, model, number, num_clients)) for number in range(num_rounds + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=24)
    arguments = parser.parse_args()
    place(arguments.engine_cores)
    with vllm_serve() as url:
        theirs = rates(url, "vllm", arguments.rounds, arguments.clients)
    with endpoint() as url:
        ours = rates(url, "base@single", arguments.rounds, arguments.clients)
    print("tokens/s, `vllm serve`:", ", ".join(f"{rate:.1f}" for rate in theirs))
    print("tokens/s, the endpoint:", ", ".join(f"{rate:.1f}" for rate in ours))
    print(f"ratio of medians {statistics.median(ours) / statistics.median(theirs):.2f}  (goal >= 0.95)", flush=True)


if __name__ == "__main__":
    main()
