"""Our training over plain TRL: tokens/s on the same rows after start-up, and the seconds of start-up.

    python benchmarks/training_speed.py [--rows 32] [--rounds 3] [--batch 4]

SmolLM2-135M, LoRA r=8, bf16, one process with two threads, or one GPU, on either side. Plain TRL is `SFTTrainer` with
its defaults in one Python process: random padded batches, and the head on every position. Ours is `train_adapters`: Ray
Train, batches of similar length, and the head on target positions. Tokens are counted without padding, from the end of
the first step to the end of the last. Start-up is the time from the start of the process to the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training_rows import MODEL, write_rows

NUM_THREADS = 2


def ours(training_set: Path, folder: Path, batch_size: int) -> dict[str, float]:
    from aft_ray.config import TrainingConfig
    from aft_ray.models import resolve_model
    from aft_ray.storage import Folder
    from aft_ray.training import TrainingJob, train_adapters
    from aft_ray.training.metrics import read_metrics

    called_at = time.time()
    job = TrainingJob(
        config=TrainingConfig(
            cpus_per_worker=NUM_THREADS, deepspeed="none", batch_size_per_worker=batch_size, bf16=True
        ),
        model=resolve_model(MODEL),
        training_set=Folder.at(training_set),
        outputs={"aft": Folder.at(folder / "model")},
        checkpoints=Folder.at(folder / "checkpoints"),
        seed=1,
    )
    summary = train_adapters(job)["aft"]
    steps = read_metrics(folder / "checkpoints" / "aft" / "metrics.jsonl")[1:]
    tokens, seconds = (sum(step[name] for step in steps) for name in ("tokens", "seconds"))
    return {"rate": tokens / seconds, "first_step_at": called_at + summary.startup_seconds}


def plain(training_set: Path, folder: Path, batch_size: int) -> dict[str, float]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from aft_ray.models import resolve_model

    class Watch(TrainerCallback):
        def __init__(self) -> None:
            self.first_step_at = 0.0
            self.seen: list[tuple[float, float]] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.first_step_at = self.first_step_at or time.time()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                self.seen.append((time.time(), kwargs["logs"]["num_tokens"]))

    torch.set_num_threads(NUM_THREADS)
    watch, model = Watch(), resolve_model(MODEL)
    rows = load_dataset("parquet", data_files=str(training_set / "*.parquet"), split="train")
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(model),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=2e-4,
            bf16=True,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            max_length=None,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watch],
    ).train()
    (began, before), (ended, after) = watch.seen[0], watch.seen[-1]
    return {"rate": (after - before) / (ended - began), "first_step_at": watch.first_step_at}


def measure(side: str, training_set: Path, batch_size: int) -> tuple[float, float]:
    """Run one side in a separate process and return its (tokens/s, start-up seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        command = [sys.executable, __file__, "--batch", str(batch_size), "--side", side, str(training_set), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(NUM_THREADS), "RAY_USAGE_STATS_ENABLED": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    numbers = [line for line in done.stdout.splitlines() if line.startswith('{"rate"')]
    if done.returncode or not numbers:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(numbers[-1])
    return found["rate"], found["first_step_at"] - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="examples per step")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, training_set, folder = arguments.side
        print(json.dumps({"ours": ours, "plain": plain}[side](Path(training_set), Path(folder), arguments.batch)))
        return
    print(
        f"training job / plain TRL: {MODEL}, {arguments.rows} rows in batches of {arguments.batch}, "
        "tokens/s after start-up"
    )
    print(f"{'round':>5} {'ours':>7} {'TRL':>7} {'ratio':>6} {'start-up, ours':>15} {'TRL':>7}")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        training_set = write_rows(Path(folder) / "rows", arguments.rows, (40, 240))
        for number in range(arguments.rounds):
            (mine, my_start), (theirs, their_start) = (
                measure(side, training_set, arguments.batch) for side in ("ours", "plain")
            )
            ratios.append(mine / theirs)
            print(
                f"{number:>5} {mine:>7.1f} {theirs:>7.1f} {ratios[-1]:>6.2f} {my_start:>13.1f} s {their_start:>5.1f} s",
                flush=True,
            )
    print(f"median ratio {statistics.median(ratios):.2f}\n")


if __name__ == "__main__":
    main()
