"""Peak memory of one training step: the head on target positions over the head on every position.

    python benchmarks/training_memory.py [--rounds 3]

SmolLM2-135M with a vocabulary of 49,152 tokens, LoRA r=8, bf16, 4 rows of about 500 tokens, of which about 40 are
trained. Each side runs forward and backward once in a separate process. The memory is the peak of the process minus
what it held before the step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training_rows import MODEL, write_rows

SIDES = ("target positions", "every position")
BATCH_SIZE = 4


def step(side: str, training_set: Path) -> float:
    """Return the peak memory of the step in MiB, minus what the process held before."""
    import psutil
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn import functional
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from aft_ray.models import resolve_model
    from aft_ray.storage import Folder
    from aft_ray.training.rows import first_examples
    from aft_ray.training.target_head import TargetHead, target_loss_sum

    base = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    rows = [
        {"input_ids": row["input_ids"], "labels": row["labels"]}
        for row in first_examples(Folder.at(training_set), "aft", BATCH_SIZE)
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=2)(rows)
    before = psutil.Process().memory_info().rss
    if side == SIDES[0]:
        loss = target_loss_sum(model, TargetHead(model), batch)
    else:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:].flatten()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="sum")
    loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(step(arguments.side[0], Path(arguments.side[1])))
        return
    print(f"peak memory of a step: {MODEL}, {BATCH_SIZE} rows of about 500 tokens, MiB")
    print(f"{'round':>5} {SIDES[0]:>17} {SIDES[1]:>15} {'ratio':>6}")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        training_set = write_rows(Path(folder) / "rows", BATCH_SIZE, (300, 320))
        for number in range(arguments.rounds):
            found = []
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, str(training_set)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found.append(float(done.stdout.splitlines()[-1]))
            ratios.append(found[0] / found[1])
            print(f"{number:>5} {found[0]:>17.0f} {found[1]:>15.0f} {ratios[-1]:>6.2f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}\n")


if __name__ == "__main__":
    main()
