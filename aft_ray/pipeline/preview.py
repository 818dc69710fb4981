"""Take a few prompts through every data stage and print them; `plan` extrapolates from them to the whole run.

A preview is a run of its own beside the real one, in `<run.dir>.preview/`, named by the settings it was made with: a
preview of other settings is never taken for a sample of these.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aft_ray.config import Config
from aft_ray.data import proposals as proposals_room
from aft_ray.data.prompts import read_prompts
from aft_ray.data.proposals import data_stages
from aft_ray.data.targets import last_stage
from aft_ray.data.training_set import tokenizer_of
from aft_ray.errors import AftError, InputError
from aft_ray.models import load_tokenizer
from aft_ray.pipeline.estimate import StepEstimate, billions_of, estimate, price_of
from aft_ray.records import fingerprint
from aft_ray.runs import Run, read_manifest
from aft_ray.storage import Folder

MARKS = ("«", "»")
"""Marks around the trained tokens where the output has no colour."""


def preview_config(config: Config, num_prompts: int) -> Config:
    """Return the same settings over the first `num_prompts` prompts, in a folder of their own."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={"dir": f"{_folder_of(config)}/{num_prompts}", "max_failure_rate": 1.0}
            ),
            "prompts": config.prompts.model_copy(update={"limit": num_prompts, "held_out": 0}),
            "selection": config.selection.model_copy(update={"easy_per_hard": None}),  # a choice over the whole set
        }
    )


def _folder_of(config: Config) -> str:
    settings: dict[str, Any] = config.model_dump(
        mode="json", exclude={"run", "training", "serving", "evaluation", "estimate"}
    )
    settings["prompts"] = {k: v for k, v in settings["prompts"].items() if k not in {"limit", "held_out"}}
    return f"{config.run.dir.rstrip('/')}.preview/{fingerprint(settings)[:8]}"


# ── preview ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(run: Run) -> None:
    """Print every prompt of a previewed run with its proposals, its target and its examples."""
    console = Console(highlight=False, soft_wrap=True)
    tokenizer = load_tokenizer(tokenizer_of(run.config.engine))
    examples: dict[str, list[Mapping[str, Any]]] = {}
    for example in run.folder.child("training_set").rows():
        examples.setdefault(example["prompt_id"], []).append(example)
    for row in run.folder.child(last_stage(run.config)).rows():
        console.rule(row["prompt_id"])
        for message in row["messages"]:
            console.print(Text(f"{message['role']}: {message['content']}"))
        for index, proposal in enumerate(row["proposals"] if run.config.makes_targets else ()):
            place = row["selected"].index(index) + 1 if index in row["selected"] else None
            score = "no score: " + str(proposal["score_error"]) if proposal["score"] is None else proposal["score"]
            chosen = f"shown as draft {place}" if place else "not selected"
            console.print(Text(f"\nproposal {index + 1} ({proposal['model']}, {score}, {chosen})", style="bold cyan"))
            console.print(Text(proposal["error"] or proposal["text"]))
        if run.config.makes_targets:
            left_out = f", left out: {row['target_filter']}" if row["target_filter"] else ""
            console.print(Text(f"\ntarget ({row['target']['model']}{left_out})", style="bold cyan"))
            console.print(Text(row["target"]["text"]))
        for made in examples.get(row["prompt_id"], []):
            console.print(Text(f"\nexample {made['example_id']}", style="bold cyan"))
            console.print(marked(tokenizer, made, console.is_terminal))
    for name in data_stages(run.config):
        manifest = run.manifest(name)
        if manifest and (manifest.failed or manifest.filtered):
            console.print(f"{name}: left out {dict(manifest.filtered)}, failed {dict(manifest.failed)}")
            console.print(f"  reasons by row: {run.folder.location}/{name}/failed") if manifest.failed else None


def show_first_batch(config: Config) -> None:
    """Print the rows of every variant's first optimizer step as they will be trained on, checked as training does."""
    from aft_ray.training.examples import MAX_CHECKED_ROWS, batch_order, check_examples, check_made_for
    from aft_ray.training.rows import first_examples, lengths_in, lengths_of, open_rows, write_rows
    from aft_ray.training.task import step_size

    console = Console(highlight=False, soft_wrap=True)
    model, template = tokenizer_of(config.engine), getattr(config.engine, "chat_template", None)
    tokenizer = load_tokenizer(model)
    training_set = Folder.at(config.run.dir).child("training_set")
    if not training_set.names(".parquet"):
        raise InputError(f"{training_set.location}: not made yet. Run: aft-ray run --until training_set")
    check_made_for(training_set, model, {"aggregator": proposals_room.aggregator_hash(config.templates)})
    for variant in config.training_set.variants:
        lengths_of(training_set, variant)  # raises InputError where there is nothing to train on
        check_examples(first_examples(training_set, variant, MAX_CHECKED_ROWS), model, template)
        with TemporaryDirectory(prefix="aft-ray-") as scratch:
            file = Path(scratch) / "rows.arrow"
            write_rows(training_set, variant, config.training.pack_length, file)
            rows = open_rows(file)
        size, lengths = step_size(config.training), lengths_in(rows).tolist()
        console.rule(f"{variant}: first step, {min(size, len(rows))} rows")
        for place in batch_order(lengths, size, config.run.seed % 2**32, epoch=0)[:size]:
            trained = sum(label >= 0 for label in rows[place]["labels"])
            console.print(Text(f"\n{lengths[place]} tokens, {trained} of them trained", style="bold cyan"))
            console.print(marked(tokenizer, rows[place], console.is_terminal))


def marked(tokenizer: Any, example: Mapping[str, Any], colour: bool) -> Text:
    """Return the decoded ids of an example, with trained tokens in green or between « and »."""
    text = Text()
    for trained, ids in _runs(example["input_ids"], example["labels"]):
        piece = tokenizer.decode(ids)
        if trained and not colour:
            piece = piece.join(MARKS)
        text.append(piece, style="green" if trained else "dim")
    return text


def _runs(input_ids: list[int], labels: list[int]) -> Iterator[tuple[bool, list[int]]]:
    """Yield runs of neighbouring ids that are all trained on, or all not."""
    pairs = zip(input_ids, labels, strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1] >= 0):
        yield trained, [token for token, _ in group]


# ── plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated needs of one stage of the whole run, extrapolated from a sample."""

    stage: str
    num_rows: int
    prompt_tokens: float
    completion_tokens: float
    engine_hours: float
    gpu_hours: float
    cost_usd: float | None
    """Endpoint charges, and GPU time if run.usd_per_gpu_hour is set; None when neither is known to apply."""


def largest_sample(config: Config) -> Run | None:
    """Return the largest finished preview of these settings."""
    folder = Folder.at(_folder_of(config))
    found = []
    for name in folder.folder_names():
        manifest = read_manifest(folder.child(name).child("training_set"))
        if name.isdigit() and manifest is not None and manifest.status == "done":
            found.append(int(name))
    if not found:
        return None
    return Run(preview_config(config, max(found)), folder.child(str(max(found))))


def count_prompts(config: Config) -> int:
    """Return how many prompts the run will have, from its folder or by reading the source once."""
    manifest = read_manifest(Folder.at(config.run.dir).child("prompts"))
    if manifest is not None and manifest.status == "done":
        return manifest.rows_out
    return sum(1 for _ in read_prompts(config.prompts, config.run.seed))


def estimates(config: Config, sample: Run, num_prompts: int) -> Iterator[Estimate]:
    """Return every stage's needs: those of the sample per input row, times the rows that will come in."""
    num_rows = float(num_prompts)
    for name in data_stages(config)[1:]:  # prompts take no engine
        manifest = sample.manifest(name)
        if manifest is None or not manifest.rows_in:
            continue
        scale = num_rows / manifest.rows_in
        hours = scale * manifest.worker_seconds / 3600
        gpu_hours = hours * manifest.gpus_per_worker
        cost = scale * manifest.cost_usd + gpu_hours * (config.run.usd_per_gpu_hour or 0)
        yield Estimate(
            stage=name,
            num_rows=round(num_rows),
            prompt_tokens=scale * manifest.prompt_tokens,
            completion_tokens=scale * manifest.completion_tokens,
            engine_hours=hours,
            gpu_hours=gpu_hours,
            cost_usd=cost or None,
        )
        if name != "training_set":
            num_rows *= manifest.rows_out / manifest.rows_in


UNCOUNTED = 10_000
"""Number of prompts that is planned for where a source cannot be read."""


def print_stated(config: Config, console: Console) -> None:
    """Print what each step would take at the speeds that `estimate` states."""
    own = config.estimate
    num_prompts, why = own.num_prompts or config.prompts.limit or 0, ""
    if not num_prompts:
        try:
            num_prompts = count_prompts(config)
        except AftError as error:
            num_prompts, why = UNCOUNTED, f"The prompts cannot be counted here ({error}), so this is for {UNCOUNTED:,}"
    steps = list(estimate(config, num_prompts))
    table = Table(title=f"{num_prompts:,} prompts on {own.num_gpus} x {own.gpu}, at stated speeds")
    for head in ("step", "tokens read", "tokens written", "GPUs", "hours", "GPU-hours", "cost, USD"):
        table.add_column(head, justify="left" if head == "step" else "right")
    for one in steps:
        table.add_row(
            one.step,
            f"{one.read:,.0f}",
            f"{one.written:,.0f}",
            f"{one.gpus:g}",
            "-" if one.hours is None else f"{one.hours:,.2f}",
            "-" if one.gpu_hours is None else f"{one.gpu_hours:,.1f}",
            _usd([one]),
        )
    table.add_section()
    known = [one for one in steps if one.gpu_hours is not None]
    hours = f"{sum(one.hours or 0 for one in known):,.2f}" if known else "-"
    gpu_hours = f"{sum(one.gpu_hours or 0 for one in known):,.1f}" if known else "-"
    table.add_row("all", "", "", "", hours, gpu_hours, _usd(steps))
    console.print(table)
    console.print(
        f"Assumed: {own.prompt_tokens} tokens a prompt, {own.answer_tokens} an answer, {price_of(config):g} USD for an "
        f"hour of a GPU, utilization {own.generation_utilization:g} in generation, {own.reading_utilization:g} in "
        f"reading, {own.training_utilization:g} in training. `estimate:` changes them"
    )
    if why:
        console.print(f"{why}. To change that, set estimate.num_prompts")
    idle = [one.step for one in steps if 0 < one.gpus < own.num_gpus]
    if idle:
        console.print(
            f"Steps that leave GPUs idle: {', '.join(idle)}. More workers (max_actors, num_workers) would use them"
        )
    sizes = {one.model: billions_of(one.model, own.billions) for one in steps if one.model}
    if known_sizes := [f"{model} {size:.3g}" for model, size in sizes.items() if size is not None]:
        console.print(f"Models, in billions of parameters: {', '.join(known_sizes)}")
    for one in steps:
        if one.gpu_hours is None:
            console.print(
                f"{one.step}: the size of its model {one.model or '(a scripted engine)'} is not known, so the sums are "
                "without it; set estimate.billions"
            )
        elif one.usd is None:
            console.print(f"{one.step}: its endpoint has no price, so the sum is without it; set prices of its engine")


def _usd(steps: Sequence[StepEstimate]) -> str:
    """Return what steps cost together, as far as that is known."""
    prices = [one.usd for one in steps if one.usd is not None]
    if prices:
        return f"{sum(prices):,.2f}"
    return "-" if any(one.gpu_hours is None for one in steps) else "no price"


def print_plan(config: Config) -> None:
    """Print what each stage will take: measured on a sample, or without one at stated speeds."""
    console = Console(highlight=False, width=120)
    sample = largest_sample(config)
    if sample is None:
        print("# no sample of these settings yet: aft-ray preview -n 32 --config ... measures one")
        stated = Console(file=io.StringIO(), highlight=False, width=118)
        print_stated(config, stated)
        for line in stated.file.getvalue().splitlines():  # type: ignore[attr-defined]
            print(f"# {line.rstrip()}")  # what `plan` prints is YAML
        return
    num_prompts = count_prompts(config)
    manifest = sample.manifest("prompts")
    num_sampled = manifest.rows_out if manifest else 0
    table = Table(title=f"{num_prompts} prompts, scaled from a sample of {num_sampled}")
    for head in ("stage", "rows", "prompt tokens", "completion tokens", "engine-hours", "GPU-hours", "cost, USD"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    total = 0.0
    for one in estimates(config, sample, num_prompts):
        total += one.cost_usd or 0
        table.add_row(
            one.stage,
            f"{one.num_rows:,}",
            f"{one.prompt_tokens:,.0f}",
            f"{one.completion_tokens:,.0f}",
            f"{one.engine_hours:.3f}",
            f"{one.gpu_hours:.3f}",
            "-" if one.cost_usd is None else f"{one.cost_usd:,.2f}",
        )
    console.print(table)
    console.print(
        f"total cost: {f'{total:,.2f} USD' if total else 'no price is set (engine.prices, run.usd_per_gpu_hour)'}"
    )
    console.print(
        "A small sample does not fill an engine's batch: hours are an upper estimate, a larger -n tightens them."
    )
