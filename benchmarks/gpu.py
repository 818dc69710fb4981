"""What only a GPU can show, each part in a process and a time limit of its own:  make test-gpu, make bench-gpu

    python benchmarks/gpu.py {test,bench} [PART ...] [--size gpu|cpu] [--within SECONDS]

    test    engine      vLLM through ours: samples, seeds, log-probabilities, adapters, cancellation, JSON
            one_gpu     two engines on one GPU, a killed engine core, a reward model in bfloat16
            line        the whole quickstart
            again       the same command again, which has nothing to do
    bench   stage       proposals stage over the bare engine                      goal >= 0.95
            aggregate   propose-and-aggregate over the published scheduling       goal >= 3
            training    training over plain TRL, tokens/s                         goal >= 1.0
            modes       packed, ZeRO-2 and ZeRO-3 over plain training, with the proof at the end and peak memory
            endpoint    endpoint over `vllm serve` at saturation                  goal >= 0.95

`runs/gpu-check/results.jsonl` gets a line as each part ends: its seconds, its exit code (124: over its limit) and the
end of its output. `runs/gpu-check/<part>.log` has the whole output. With `--within`, parts whose limit does not fit
into the time left are left out and named. `--size cpu` runs the same parts on a machine without a GPU, in small.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "gpu-check"
PYTEST = ("-m", "pytest", "-n", "0", "-m", "", "-p", "no:cacheprovider", "--durations=10")
OVER_LIMIT = 124
"""Exit code of a part that ran longer than its limit, as `timeout` has it."""


@dataclass(frozen=True)
class Part:
    """One part: a Python command line, what `--size cpu` replaces in it, and the limit in seconds."""

    command: tuple[str, ...]
    limit_s: int
    on_cpu: tuple[str, ...] | None = None
    """The command for `--size cpu`. None: the same."""


QUICKSTART = ("-m", "aft_ray", "run", "--config", "configs/quickstart.yaml", "--set", f"run.dir={FOLDER}/quickstart")


def _bench(script: str, *arguments: str) -> tuple[str, ...]:
    return (f"benchmarks/{script}.py", *arguments)


PARTS: dict[str, dict[str, Part]] = {
    "test": {
        "engine": Part((*PYTEST, "tests/engines/test_real_models.py", "-k", "vllm"), 240),
        "one_gpu": Part((*PYTEST, "tests/engines/test_one_gpu.py"), 200),
        "line": Part(QUICKSTART, 300),
        "again": Part(QUICKSTART, 60),
    },
    "bench": {
        "stage": Part(
            _bench("proposals_stage", "--rounds", "3", "--samples", "16", "--max-tokens", "256"),
            180,
            _bench("proposals_stage", "--prompts", "24", "--rounds", "2"),
        ),
        "aggregate": Part(
            _bench("propose_aggregate", "--prompts", "120", "--rounds", "2", "--max-tokens", "256"),
            240,
            _bench("propose_aggregate", "--prompts", "16", "--rounds", "1"),
        ),
        "training": Part(
            _bench("training_speed", "--rows", "640", "--rounds", "2", "--batch", "16"),
            240,
            _bench("training_speed", "--rows", "16", "--rounds", "1"),
        ),
        "modes": Part(
            _bench("training_modes", "--rows", "320", "--rounds", "1"),
            240,
            _bench("training_modes", "--rows", "16", "--rounds", "1"),
        ),
        "endpoint": Part(
            _bench("serving_saturation", "--engine-cores", "0", "--clients", "256", "--rounds", "3"),
            240,
            _bench("serving_saturation", "--engine-cores", "0", "--rounds", "1"),
        ),
    },
}


def run_part(name: str, part: Part, size: str) -> dict[str, object]:
    """Run one part to its end or its limit, and return its result. Its processes are gone afterwards."""
    command = part.on_cpu if size == "cpu" and part.on_cpu else part.command
    log = FOLDER / f"{name}.log"
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "AFT_RAY_GPU_CHECK": size},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            code = OVER_LIMIT
        finally:
            _end_group(process)
    lines = log.read_text(errors="replace").splitlines()
    return {
        "part": name,
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
        "limit_s": part.limit_s,
        "command": " ".join(["python", *command]),
        "output": lines[-25:],
    }


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what the part left of its process group, so that the next part finds the GPU free."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def gpu_name() -> str | None:
    """Return name, driver and memory of the first GPU, or None without one."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return None
    return found.stdout.splitlines()[0] if found.returncode == 0 and found.stdout else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(PARTS))
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--size", choices=["gpu", "cpu"], help="default: gpu where nvidia-smi finds one")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="leave out what does not fit into this time")
    arguments = parser.parse_args()
    parts, gpu = PARTS[arguments.kind], gpu_name()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; {arguments.kind} has {', '.join(parts)}")
    size = arguments.size or ("gpu" if gpu else "cpu")
    if size == "gpu" and gpu is None:
        parser.error("nvidia-smi finds no GPU here; --size cpu runs the same parts without one, in small")
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = FOLDER / "results.jsonl"
    print(f"{arguments.kind} on {gpu or 'CPUs'}; results: {results}", flush=True)
    started, codes = time.monotonic(), []
    for name in arguments.parts or parts:
        left = None if arguments.within is None else arguments.within - (time.monotonic() - started)
        if left is not None and parts[name].limit_s > left:
            print(f"{name:<10} left out: its limit is {parts[name].limit_s} s, and {left:.0f} s are left", flush=True)
            continue
        print(f"{name:<10} ...", end="", flush=True)
        result = {"kind": arguments.kind, "gpu": gpu, **run_part(name, parts[name], size)}
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        codes.append(result["exit_code"])
        outcome = {0: "passed", OVER_LIMIT: "over its limit"}.get(int(str(result["exit_code"])), "failed")
        print(f" {outcome} after {result['seconds']} s", flush=True)
        print("\n".join(f"           {line}" for line in list(result["output"])[-12:]), flush=True)  # type: ignore[call-overload]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
