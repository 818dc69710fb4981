"""The folder of a finished adapter: complete or absent.

    adapter_model.safetensors, adapter_config.json   plain peft and vLLM load these
    tokenizer files                                  the base model's, with its exact chat template
    model_card.md                                    what the adapter was made from and how the training went
    summary.json                                     the same as numbers, with the fingerprint

The files are written to a folder beside it, which is renamed at the end. On object storage, which cannot rename, they
are uploaded with summary.json as the last: a folder without it is no adapter.
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
from aft_ray.storage import PARTIAL, Folder, empty_partial
from aft_ray.templates.families import template_text
from aft_ray.training.identity import base_name
from aft_ray.training.task import TrainingJob, TrainSummary, TrainTask

SUMMARY = "summary.json"
CARD = "model_card.md"


def is_finished(task: TrainTask) -> bool:
    """Return whether the output is complete."""
    return task.output.exists(SUMMARY)


def finished_summary(task: TrainTask) -> TrainSummary | None:
    """Return the stored summary where the output holds the adapter of this task, and None where there is no output.

    Raises ResumeRefused where the output belongs to another task.
    """
    if not is_finished(task):
        if task.output.is_local and task.output.exists():
            raise ResumeRefused(
                f"{task.output.location} exists, but holds no {SUMMARY} of a trained adapter. Choose another folder"
            )
        return None
    stored = json.loads(task.output.read_bytes(SUMMARY))
    if stored["fingerprint"] != task.fingerprint:
        raise ResumeRefused(
            f"{task.output.location} holds an adapter that was made from other settings:\n"
            f"{difference(stored['settings'], json.loads(json.dumps(task.settings)))}\n"
            "Choose another folder, or remove this one"
        )
    return TrainSummary(**stored["summary"])


def partial_output(task: TrainTask, scratch: Path) -> Path:
    """Return an empty local folder in which to save what becomes the output."""
    return empty_partial(Path(task.output.path) if task.output.is_local else scratch / "output")


def finish_folder(task: TrainTask, job: TrainingJob, model: str, summary: TrainSummary, folder: Path) -> None:
    """Add tokenizer, model card and summary to the local `folder`, and make it the output.

    `model` is what the job's reference of the base model stands for on this node.
    """
    from transformers import AutoTokenizer

    for stray in ("training_args.bin", "README.md"):
        (folder / stray).unlink(missing_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    if job.chat_template is not None:
        tokenizer.chat_template = template_text(job.chat_template)
    tokenizer.save_pretrained(folder)
    name_base(folder, *base_name(task.settings["model"], job.model))
    trained_with = versions()
    (folder / CARD).write_text(model_card(task.settings, job.model, summary, trained_with))
    stored = {
        "fingerprint": task.fingerprint,
        "summary": dataclasses.asdict(summary),
        "settings": task.settings,
        "versions": trained_with,
    }
    (folder / SUMMARY).write_text(json.dumps(stored, indent=1))
    if task.output.is_local:
        folder.rename(task.output.path)
    else:
        _upload(folder, task.output)


def name_base(folder: Path, name: str, revision: str | None) -> None:
    """Write the base model's name and commit into an adapter's own config, where the path on this node was."""
    file = folder / "adapter_config.json"
    if file.is_file():
        config = json.loads(file.read_text()) | {"base_model_name_or_path": name, "revision": revision}
        file.write_text(json.dumps(config, indent=2))


def keep_unproved(task: TrainTask, folder: Path) -> str:
    """Keep what was saved but did not pass the proof, beside the output, and return where."""
    if task.output.is_local:
        return str(folder)
    kept = dataclasses.replace(task.output, path=task.output.path + PARTIAL)
    _upload(folder, kept)
    return kept.location


def _upload(folder: Path, output: Folder) -> None:
    """Copy the files of a local folder to object storage, the summary last."""
    files = sorted(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda file: (file.name == SUMMARY, file)
    )
    for file in files:
        name = str(file.relative_to(folder))
        with (
            output.reached("written", name),
            file.open("rb") as source,
            output.fs.open_output_stream(output.file(name)) as sink,
        ):
            shutil.copyfileobj(source, sink, length=8 * 2**20)


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
    model, revision = base_name(settings["model"], model)
    is_whole = settings["training"].get("method") == "full"
    held_out = summary.held_out_perplexity or {}
    parts = {
        "Made from": {
            "base model": model,
            **({"revision of the base model": revision} if revision else {}),
            "variant": variant,
            "training rows": summary.num_rows,
            "data fingerprint": fingerprint(settings["training_set"]),
            "seed": settings["seed"],
            "task fingerprint": fingerprint(settings),
        },
        "Templates": settings["templates"],
        "Training": {
            "optimizer steps": summary.num_steps,
            "exported": exported_state(summary),
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


def exported_state(summary: TrainSummary) -> str:
    """Say which state of the training is exported, and what ended the training."""
    state = "the last step"
    if summary.exported_step not in (None, summary.num_steps):
        state = f"step {summary.exported_step}, which had the lowest loss on held-out examples"
    return state + (", after an early stop" if summary.stopped_early else "")


def _table(rows: Mapping[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | `{value}` |\n" for name, value in rows.items())


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
