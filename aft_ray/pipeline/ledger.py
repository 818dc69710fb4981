"""What a run has spent so far, step by step, beside what `plan` estimates for all of it.

    step              tokens  GPU-hours        USD   estimate: GPU-hours        USD
    proposals      1,204,551       0.31       2.13                  0.35       2.41

Manifests and summaries of trainings count tokens and worker seconds over all attempts. Seconds of workers without a
GPU cost nothing here; remote endpoints cost their tokens (`engine.prices`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from aft_ray.config import Config
from aft_ray.data.proposals import data_stages
from aft_ray.pipeline.estimate import estimate, price_of
from aft_ray.pipeline.preview import estimates, largest_sample
from aft_ray.runs import MANIFEST, Manifest, read_manifest
from aft_ray.storage import Folder, list_files

LINE = "{:<14} {:>14} {:>10} {:>10}   {:>20} {:>10}"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one step has taken, or is estimated to take."""

    step: str
    tokens: int
    """Tokens that models have read and written."""
    gpu_hours: float
    usd: float


def spent(folder: Folder, config: Config) -> Iterator[Spent]:
    """Yield what each step with a model has taken so far."""
    manifests = {name: read_manifest(folder.child(name)) for name in data_stages(config)}
    for name, manifest in manifests.items():
        if manifest is not None and manifest.prompt_tokens + manifest.completion_tokens + manifest.gpus_per_worker:
            yield _of_manifests(name, [manifest], config)
    has_gpus = any(manifest is not None and manifest.gpus_per_worker for manifest in manifests.values())
    yield from _training(folder, config, has_gpus)
    evaluation = folder.child("evaluation")
    files = list_files(evaluation) if evaluation.exists() else {}
    parts = [read_manifest(evaluation.child(file.removesuffix(f"/{MANIFEST}"))) for file in files if _is_manifest(file)]
    if parts:
        yield _of_manifests("evaluate", [part for part in parts if part is not None], config)


def _is_manifest(file: str) -> bool:
    return file.endswith(f"/{MANIFEST}")


def _of_manifests(step: str, manifests: list[Manifest], config: Config) -> Spent:
    hours = sum(one.worker_seconds * one.gpus_per_worker for one in manifests) / 3600
    return Spent(
        step=step,
        tokens=sum(one.prompt_tokens + one.completion_tokens for one in manifests),
        gpu_hours=hours,
        usd=sum(one.cost_usd for one in manifests) + hours * price_of(config),
    )


def _training(folder: Folder, config: Config, has_gpus: bool) -> Iterator[Spent]:
    """Yield the finished trainings as one step."""
    gpus = config.training.gpus_per_worker
    if gpus is None:  # one each where the cluster has GPUs, as the stages before have found
        gpus = 1.0 if has_gpus else 0.0
    tokens, seconds = 0, 0.0
    for variant in config.training_set.variants:
        model = folder.child(f"model/{variant}")
        if model.exists("summary.json"):
            summary = json.loads(model.read_bytes("summary.json"))["summary"]
            tokens += summary["num_tokens"]
            seconds += (summary["seconds"] + summary["startup_seconds"]) * summary["world_size"]
    if tokens:
        hours = seconds * gpus / 3600
        yield Spent(step="train", tokens=tokens, gpu_hours=hours, usd=hours * price_of(config))


def estimated(folder: Folder, config: Config) -> dict[str, Spent]:
    """Return what each step was estimated to take: measured on a preview where there is one, else at stated speeds."""
    prompts = read_manifest(folder.child("prompts"))
    if prompts is None or not prompts.rows_out:
        return {}
    found = {
        one.step: Spent(
            step=one.step, tokens=round(one.read + one.written), gpu_hours=one.gpu_hours or 0.0, usd=one.usd or 0.0
        )
        for one in estimate(config, prompts.rows_out)
    }
    sample = largest_sample(config)
    if sample is not None:
        for stage in estimates(config, sample, prompts.rows_out):
            tokens = round(stage.prompt_tokens + stage.completion_tokens)
            found[stage.stage] = Spent(
                step=stage.stage, tokens=tokens, gpu_hours=stage.gpu_hours, usd=stage.cost_usd or 0.0
            )
    return found


def print_ledger(folder: Folder, config: Config) -> None:
    """Print what each step has spent, beside its estimate; nothing before the first model was used."""
    lines = list(spent(folder, config))
    if not lines:
        return
    planned = estimated(folder, config)
    print("\n" + LINE.format("spent", "tokens", "GPU-hours", "USD", "estimate: GPU-hours", "USD"))
    for one in lines:
        plan = planned.get(one.step)
        of_plan = (f"{plan.gpu_hours:.2f}", f"{plan.usd:,.2f}") if plan else ("–", "–")
        print(LINE.format(one.step, f"{one.tokens:,}", f"{one.gpu_hours:.2f}", f"{one.usd:,.2f}", *of_plan))
    total = [f"{sum(one.tokens for one in lines):,}", f"{sum(one.gpu_hours for one in lines):.2f}"]
    print(LINE.format("all", *total, f"{sum(one.usd for one in lines):,.2f}", "", ""))
