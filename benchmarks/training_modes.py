"""Training modes on the same rows: tokens/s by ZeRO stage, and packed rows over padded ones.

    python benchmarks/training_modes.py [--rows 24] [--rounds 3]

SmolLM2-135M, LoRA r=8, bf16, two Ray Train workers with one CPU each, or one with a GPU. The modes take turns in one
group of workers. Tokens are counted without padding, and the first step of each mode is left out. Ratios are over the
first mode (plain data parallelism, padded) of the same round. Examples have about 100 to 450 tokens and batches hold
examples of similar length, so there is little padding to save.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from training_rows import MODEL, write_rows

ON_GPU = torch.cuda.is_available()
BATCH_SIZE = 16 if ON_GPU else 2
BASE: dict[str, Any] = {
    "num_workers": 1 if ON_GPU else 2, "deepspeed": "none", "batch_size_per_worker": BATCH_SIZE,
    "gpus_per_worker": int(ON_GPU),
}  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"pack_length": 1024, "batch_size_per_worker": BATCH_SIZE // 2},
    **{f"zero{stage}": {"deepspeed": f"zero{stage}"} for stage in range(4)},
}


def rates(training_set: Path, folder: Path, num_rounds: int) -> list[dict[str, float]]:
    """Return the tokens/s of every mode, by round."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from aft_ray.config import TrainingConfig
    from aft_ray.models import resolve_model
    from aft_ray.storage import Folder
    from aft_ray.training import TrainingJob
    from aft_ray.training.metrics import read_metrics
    from aft_ray.training.run import _worker_environment, plan_training

    plans = {}
    for number in range(num_rounds):
        for mode, changes in MODES.items():
            place = folder / f"{number}-{mode}"
            plans[number, mode], _ = plan_training(
                TrainingJob(
                    config=TrainingConfig.model_validate({**BASE, **changes}),
                    model=resolve_model(MODEL),
                    training_set=Folder.at(training_set),
                    outputs={"aft": Folder.at(place / "model")},
                    checkpoints=Folder.at(place / "checkpoints"),
                    seed=1,
                )
            )

    def train_all(loop: dict[str, Any]) -> None:
        from aft_ray.training import trainer
        from aft_ray.training.worker import run_worker

        # to Ray Train all modes are one training of one variant: none may continue from another mode's checkpoint
        trainer.last_checkpoint = lambda task: None
        for (number, mode), plan in loop["plans"].items():
            if (error := run_worker({"plan": plan})["error"]) is not None:
                raise error
            if ON_GPU:
                (folder / f"{number}-{mode}" / "peak").write_text(str(torch.cuda.max_memory_allocated() >> 20))
                torch.cuda.reset_peak_memory_stats()

    environment = {"env_vars": _worker_environment(TrainingConfig())}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    TorchTrainer(
        train_all,
        train_loop_config={"plans": plans},
        torch_config=TorchConfig(backend="nccl" if ON_GPU else "gloo"),
        scaling_config=ScalingConfig(num_workers=BASE["num_workers"], use_gpu=ON_GPU),
        run_config=RunConfig(storage_path=str(folder), name="modes", worker_runtime_env=environment),
    ).fit()
    ray.shutdown()
    found: list[dict[str, float]] = [{} for _ in range(num_rounds)]
    for (number, mode), plan in plans.items():
        if ON_GPU:
            print(f"{mode:<8} peak {(folder / f'{number}-{mode}' / 'peak').read_text()} MiB of GPU memory")
        steps = read_metrics(plan.tasks[0].metrics_file)[1:]
        found[number][mode] = sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        training_set = write_rows(Path(folder) / "rows", arguments.rows, (10, 300))
        found = rates(training_set, Path(folder), arguments.rounds)
    print(
        f"training modes: {MODEL}, {arguments.rows} rows, {BASE['num_workers']} workers, "
        "tokens/s and ratio over the first mode"
    )
    print(f"{'mode':<8} {'tokens/s by round':<24} {'ratio by round':<20} {'median':>6}")
    first = next(iter(MODES))
    for mode in MODES:
        speeds = [one[mode] for one in found]
        ratios = [one[mode] / one[first] for one in found]
        print(
            f"{mode:<8} {', '.join(f'{speed:.1f}' for speed in speeds):<24} "
            f"{', '.join(f'{ratio:.2f}' for ratio in ratios):<20} {statistics.median(ratios):>6.2f}"
        )
    print()


if __name__ == "__main__":
    main()
