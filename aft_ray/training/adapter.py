"""The folder of a finished adapter: complete or absent.

    adapter_model.safetensors, adapter_config.json   loads in plain peft and in vLLM
    tokenizer files                                  with the exact chat template of the base model
    model_card.md                                    what it was made from and how the training went
    summary.json                                     the same as numbers, with the fingerprint

It is written to a folder beside it and renamed at the end.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aft_ray.errors import ResumeRefused
from aft_ray.records import fingerprint
from aft_ray.runs import difference, versions
from aft_ray.training.task import TrainSummary, TrainTask

SUMMARY = "summary.json"


def partial_folder(output: Path) -> Path:
    """Where an adapter is written before it is proved and renamed."""
    return output.with_name(output.name + ".partial")


def finished_summary(task: TrainTask) -> TrainSummary | None:
    """The stored summary when the output holds this task's adapter; None when there is no output.

    Raises ResumeRefused when the output is another task's.
    """
    file = task.output / SUMMARY
    if not task.output.exists():
        return None
    if not file.is_file():
        raise ResumeRefused(f"{task.output} exists and holds no trained adapter ({SUMMARY}). Choose another folder")
    stored = json.loads(file.read_text())
    if stored["fingerprint"] != task.fingerprint:
        raise ResumeRefused(
            f"{task.output} holds an adapter made from other settings:\n"
            f"{difference(stored['settings'], json.loads(json.dumps(task.settings)))}\n"
            "Choose another folder, or remove this one"
        )
    return TrainSummary(**stored["summary"])


def finish_folder(task: TrainTask, model: str, summary: TrainSummary) -> None:
    """Adds tokenizer, card and summary to the partial folder, and gives it its name."""
    from transformers import AutoTokenizer

    folder = partial_folder(task.output)
    for stray in ("training_args.bin", "README.md"):
        (folder / stray).unlink(missing_ok=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    (folder / "model_card.md").write_text(model_card(task, model, summary))
    stored = {"fingerprint": task.fingerprint, "summary": dataclasses.asdict(summary), "settings": task.settings}
    (folder / SUMMARY).write_text(json.dumps(stored, indent=1))
    folder.rename(task.output)


def clear_partial(task: TrainTask) -> Path:
    """An empty folder to write the adapter into; what a killed run left there is removed."""
    folder = partial_folder(task.output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def model_card(task: TrainTask, model: str, summary: TrainSummary) -> str:
    """The card as Markdown."""
    settings = task.settings
    parts = {
        "Made from": {
            "base model": model,
            "variant": task.variant,
            "training rows": summary.num_rows,
            "data fingerprint": fingerprint(settings["training_set"]),
            "seed": settings["seed"],
            "task fingerprint": task.fingerprint,
        },
        "Templates": settings["templates"],
        "Training": {
            "optimizer steps": summary.num_steps,
            "workers": summary.world_size,
            "tokens": summary.num_tokens,
            "trained tokens": summary.num_trained_tokens,
            "first loss": round(summary.first_loss, 4),
            "last loss": round(summary.last_loss, 4),
            "seconds": round(summary.seconds, 1),
            "tokens per second": round(summary.tokens_per_second, 1),
            "resumed from step": summary.resumed_from_step,
        },
        "Settings": _flat(settings["training"]),
        "Versions": versions(),
    }
    sections = [f"## {title}\n\n{_table(rows)}" for title, rows in parts.items() if rows]
    intro = f"LoRA adapter `{task.variant}` for `{model}`, trained by Aggregation Fine-Tuning (arXiv 2501.11877).\n"
    return "\n".join([f"# {task.variant} adapter\n", intro, *sections])


def _table(rows: Mapping[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | `{value}` |\n" for name, value in rows.items())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
