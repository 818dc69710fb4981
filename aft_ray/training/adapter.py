"""The folder of a finished adapter: complete or absent.

    adapter_model.safetensors, adapter_config.json   plain peft and vLLM load these
    tokenizer files                                  the base model's, with its exact chat template
    model_card.md                                    what the adapter was made from and how the training went
    summary.json                                     the same as numbers, with the fingerprint

The files are written to a folder beside it, which is renamed at the end.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from aft_ray.errors import ResumeRefused
from aft_ray.records import fingerprint
from aft_ray.runs import difference, versions
from aft_ray.storage import partial_folder
from aft_ray.training.task import TrainSummary, TrainTask

SUMMARY = "summary.json"
CARD = "model_card.md"


def finished_summary(task: TrainTask) -> TrainSummary | None:
    """Return the stored summary where the output holds the adapter of this task, and None where there is no output.

    Raises ResumeRefused where the output belongs to another task.
    """
    file = task.output / SUMMARY
    if not task.output.exists():
        return None
    if not file.is_file():
        raise ResumeRefused(f"{task.output} exists, but holds no {SUMMARY} of a trained adapter. Choose another folder")
    stored = json.loads(file.read_text())
    if stored["fingerprint"] != task.fingerprint:
        raise ResumeRefused(
            f"{task.output} holds an adapter that was made from other settings:\n"
            f"{difference(stored['settings'], json.loads(json.dumps(task.settings)))}\n"
            "Choose another folder, or remove this one"
        )
    return TrainSummary(**stored["summary"])


def finish_folder(task: TrainTask, model: str, summary: TrainSummary) -> None:
    """Add tokenizer, model card and summary to the partial folder, and rename it to the output."""
    from transformers import AutoTokenizer

    folder = partial_folder(task.output)
    for stray in ("training_args.bin", "README.md"):
        (folder / stray).unlink(missing_ok=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    trained_with = versions()
    (folder / CARD).write_text(model_card(task.settings, model, summary, trained_with))
    stored = {
        "fingerprint": task.fingerprint,
        "summary": dataclasses.asdict(summary),
        "settings": task.settings,
        "versions": trained_with,
    }
    (folder / SUMMARY).write_text(json.dumps(stored, indent=1))
    folder.rename(task.output)


def model_card(
    settings: Mapping[str, Any],
    model: str,
    summary: TrainSummary,
    trained_with: Mapping[str, str],
    merging: Mapping[str, Any] | None = None,
) -> str:
    """Return the model card as Markdown.

    `settings` are those of the task, and `trained_with` the versions of the libraries. `merging` says how the adapter
    was merged into the base model (export.py); None for the folder that training saves.
    """
    variant = settings["variant"]
    is_whole = settings["training"].get("method") == "full"
    held_out = summary.held_out_perplexity or {}
    parts = {
        "Made from": {
            "base model": model,
            "variant": variant,
            "training rows": summary.num_rows,
            "data fingerprint": fingerprint(settings["training_set"]),
            "seed": settings["seed"],
            "task fingerprint": fingerprint(settings),
        },
        "Templates": settings["templates"],
        "Training": {
            "optimizer steps": summary.num_steps,
            "workers": summary.world_size,
            "tokens": summary.num_tokens,
            "trained tokens": summary.num_trained_tokens,
            "first loss": round(summary.first_loss, 4),
            "last loss": round(summary.last_loss, 4),
            **{f"held-out perplexity, {name}": round(value, 3) for name, value in held_out.items()},
            "seconds": round(summary.seconds, 1),
            "tokens per second": round(summary.tokens_per_second, 1),
            "resumed from step": summary.resumed_from_step,
        },
        "Settings": _flat(settings["training"]),
        "Versions": trained_with,
        "Merging": merging or {},
    }
    sections = [f"## {title}\n\n{_table(rows)}" for title, rows in parts.items() if rows]
    kind, what = "adapter", f"LoRA adapter `{variant}` for `{model}`"
    if merging:
        kind, what = "merged model", f"`{model}` with the LoRA adapter `{variant}` merged into its weights"
    elif is_whole:
        kind, what = "model", f"`{model}` with every weight fine-tuned as `{variant}`"
    intro = f"{what}, trained by Aggregation Fine-Tuning (arXiv 2501.11877).\n"
    return "\n".join([f"# {variant} {kind}\n", intro, *sections])


def _table(rows: Mapping[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | `{value}` |\n" for name, value in rows.items())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
