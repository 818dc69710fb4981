"""How a run goes, read from its folder alone: what is done, running or failed, and at what rate.

    run /home/me/runs/quickstart, last written 3 s ago
    at work: pid 4711 on node-1, since 2026-11-27 08:01:02 UTC
    prompts        done      120 rows
    proposals      running   48 of 120 rows, 2 failed, 3.1 rows/s, 240 tok/s, 23 s left
    train          waiting

It needs no cluster and disturbs nobody: what is printed is what files hold, so rates count finished shards only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from aft_ray.config import Config, validate
from aft_ray.data import DATA_STAGES
from aft_ray.data.proposals import data_stages
from aft_ray.errors import ConfigError
from aft_ray.pipeline import LINE
from aft_ray.pipeline.ledger import print_ledger
from aft_ray.run_lock import is_claim, owner_of
from aft_ray.runs import MANIFEST, RESOLVED, Manifest, read_manifest
from aft_ray.shards import read_receipt
from aft_ray.storage import Folder, list_files

EVENTS = "events.jsonl"
STATES = {"started": "running", "finished": "done", "failed": "failed"}
"""State of a step by its last event."""
INTERRUPTIONS = {"KeyboardInterrupt", "StopRequested"}


@dataclass(frozen=True, kw_only=True)
class StepStatus:
    """One line of the status: a step, or a part of one that has a folder of its own."""

    name: str
    state: str
    """done, running, failed, stopped (begun and interrupted, or made only in part) or waiting."""
    text: str = ""


def holds_run(location: str) -> bool:
    """Return whether a folder or URL holds a run that can be read from here."""
    try:
        return Folder.at(location).exists(RESOLVED)
    except (ConfigError, OSError):
        return False


def print_run(location: str) -> None:
    """Print the state of every step of a run."""
    folder = Folder.at(location)
    owner = owner_of(folder)
    written = max(info.mtime_ns for name, info in list_files(folder).items() if not is_claim(name)) / 1e9
    print(f"run {folder.location}, last written {max(time.time() - written, 0):.0f} s ago")
    print(f"at work: pid {owner.pid} on {owner.host}, since {owner.since}" if owner else "no command is at work on it")
    config: Config = validate(
        Config, yaml.safe_load(folder.read_bytes(RESOLVED)), origin=f"{folder.location}/{RESOLVED}"
    )
    for step in run_status(folder, config, is_owned=owner is not None):
        print(f"{step.name:<22} {step.state:<8} {step.text}".rstrip())
    print_ledger(folder, config)


def run_status(folder: Folder, config: Config, is_owned: bool) -> list[StepStatus]:
    """Return the state of every step of a run, in order. Without an owner, nothing is running."""
    events = folder.json_lines(EVENTS)
    latest = {event["step"]: event for event in events if event["event"] in STATES}
    found: list[StepStatus] = []
    for name in LINE:
        if name == "target_scores" and not config.scores_targets:
            continue
        if name == "miniature" and config.miniature is None:
            continue
        found += _step(folder, config, events, name, latest.get(name), is_owned)
    return found


def _step(
    folder: Folder,
    config: Config,
    events: list[dict[str, Any]],
    name: str,
    event: Mapping[str, Any] | None,
    is_owned: bool,
) -> Iterator[StepStatus]:
    state = STATES[event["event"]] if event else "waiting"
    if event and (event.get("error") in INTERRUPTIONS or (state == "running" and not is_owned)):
        state = "stopped"
    if name in DATA_STAGES:
        yield from _data_stages(folder, config, name, state)
    elif name == "train":
        yield from _training(folder, config, events, state)
    elif name == "evaluate":
        yield StepStatus(name=name, state=state)
        yield from _evaluation(folder, state)
    else:
        yield StepStatus(name=name, state=state)
    if event and event["event"] == "failed":
        yield StepStatus(name="", state="", text=f"{event['error']}: {event['message']}".rstrip(": "))


def _data_stages(folder: Folder, config: Config, step: str, state: str) -> Iterator[StepStatus]:
    """Yield the folders of one data step: one, but for proposals by several proposers."""
    order = data_stages(config)
    for name in order:
        if name != step and not name.startswith(f"{step}-part-"):
            continue
        before = order.index(name) - 1
        source = read_manifest(folder.child(order[before])) if before >= 0 else None
        yield _stage(name, folder.child(name), state, source.rows_out if source else None)


def _stage(name: str, folder: Folder, state: str, total: int | None) -> StepStatus:
    manifest = read_manifest(folder)
    if manifest is None:
        return StepStatus(name=name, state="waiting" if state == "done" else state)
    if manifest.status == "done":
        return StepStatus(name=name, state="done", text=_counts(manifest, manifest.rows_out))
    done = manifest.rows_in
    for shard in set(folder.names(".parquet")) - set(manifest.files):  # finished since the manifest was written
        done += read_receipt(folder, shard).rows_in
    state = "stopped" if state == "done" else state
    text = _counts(manifest, done, total, is_running=state == "running")
    return StepStatus(name=name, state=state, text=text)


def _counts(manifest: Manifest, rows: int, total: int | None = None, is_running: bool = False) -> str:
    parts = [f"{rows} rows" if total is None else f"{rows} of {total} rows"]
    if manifest.num_failed:
        parts.append(f"{manifest.num_failed} failed")
    if manifest.completion_tokens:
        parts.append(f"{manifest.completion_tokens:,} tokens")
    if manifest.busy_seconds >= 1 and manifest.rows_in:
        rate = manifest.rows_in / manifest.busy_seconds
        parts.append(f"{rate:.3g} rows/s")
        if manifest.completion_tokens:
            parts.append(f"{manifest.completion_tokens / manifest.busy_seconds:,.0f} tok/s")
        if total is not None and is_running:
            parts.append(f"{(total - rows) / rate:.0f} s left")
    return ", ".join(parts)


def _training(folder: Folder, config: Config, events: list[dict[str, Any]], state: str) -> Iterator[StepStatus]:
    """Yield the variants that are trained."""
    planned = {event["variant"]: event["num_steps"] for event in events if event["event"] == "training"}
    for variant in config.training_set.variants:
        rows = folder.child(f"checkpoints/{variant}").json_lines("metrics.jsonl")
        text = ""
        if rows:
            seconds, step = sum(row["seconds"] for row in rows) / len(rows), rows[-1]["step"]
            num_steps = planned.get(variant)
            text = f"step {step}" + (f" of {num_steps}" if num_steps else "")
            text += f", loss {rows[-1]['loss']:.3f}, {seconds:.3g} s a step"
            text += f", {sum(row['tokens'] for row in rows) / max(seconds * len(rows), 1e-9):,.0f} tok/s"
            if num_steps and step < num_steps and state == "running":
                text += f", {(num_steps - step) * seconds:.0f} s left"
        is_done = folder.child(f"model/{variant}").exists("summary.json")
        own = "done" if is_done else "waiting" if not rows and state == "done" else state
        yield StepStatus(name=f"train {variant}", state=own, text=text)


def _evaluation(folder: Folder, state: str) -> Iterator[StepStatus]:
    """Yield the parts of the evaluation that have begun: answers and scores of each system, perplexities of models."""
    evaluation = folder.child("evaluation")
    for file in list_files(evaluation) if evaluation.exists() else ():
        name, _, last = file.rpartition("/")
        if last == MANIFEST:
            yield _stage(f"  {name}", evaluation.child(name), state, None)
