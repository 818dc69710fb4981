"""The cost of a kill: the time of a run that is killed in the middle and continued, over that of a whole run.

    python benchmarks/resume.py [--prompts 400] [--rounds 3]

It runs the proposals stage with a scripted model of 20 ms per token. SIGKILL ends the whole process group when half of
the shards are written, and the same command runs again. The lost time has two parts: a second start of Ray and the
worker, which a longer run does not pay more often, and the rows that were in flight.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS_PER_SHARD = 8
NUM_TOKENS = 64


def command(folder: Path, num_prompts: int) -> list[str]:
    source = folder / "prompts.jsonl"
    source.write_text("".join(f'{{"prompt": "Name {n} birds."}}\n' for n in range(num_prompts)))
    engine = f"engine={{type: scripted, num_tokens: {NUM_TOKENS}, seconds_per_token: 0.02}}"
    config = folder / "run.yaml"
    config.write_text(f"run: {{dir: {folder}/run}}\nengine: {{type: scripted}}\n")
    settings = [engine, f"prompts.source={source}", f"prompts.rows_per_shard={ROWS_PER_SHARD}", "prompts.held_out=0"]
    settings += ["proposals.placement.max_shards_in_flight=2"]
    flags = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "aft_ray", "run", "--config", str(config), "--until", "proposals", *flags]


def uninterrupted(folder: Path, num_prompts: int) -> float:
    started = time.monotonic()
    subprocess.run(command(folder, num_prompts), check=True, capture_output=True)
    return time.monotonic() - started


def killed_once(folder: Path, num_prompts: int) -> float:
    arguments = command(folder, num_prompts)
    started = time.monotonic()
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((folder / "run" / "proposals").glob("*.parquet"))) < num_prompts / ROWS_PER_SHARD / 2:
        if process.poll() is not None:
            raise SystemExit(f"the run ended by itself with {process.returncode}; use more prompts")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    seconds = time.monotonic() - started
    started = time.monotonic()
    subprocess.run(arguments, check=True, capture_output=True)
    return seconds + time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"kill at half + resume / uninterrupted: {arguments.prompts} prompts, shards of {ROWS_PER_SHARD}")
    print(f"{'round':>5} {'whole s':>8} {'killed s':>9} {'lost s':>7} {'ratio':>6}")
    ratios = []
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
            first = uninterrupted(Path(whole), arguments.prompts)
            second = killed_once(Path(killed), arguments.prompts)
        ratios.append(second / first)
        print(f"{number:>5} {first:>8.1f} {second:>9.1f} {second - first:>7.1f} {ratios[-1]:>6.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}\n")


if __name__ == "__main__":
    main()
