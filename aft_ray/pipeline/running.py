"""Running one stage of a run: with the run's settings, and with one line where there is nothing left to do."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from aft_ray.runs import Manifest, Run, read_manifest
from aft_ray.shards import Stage
from aft_ray.stages import run_stage

LOW_YIELD = 0.5
"""Share of useful rows of a stage below which it is said."""


def run_in(run: Run, stage: Stage, connect: Callable[[], None]) -> bool:
    """Run a stage and return whether there was anything to do. `connect` is called if its workers are needed."""
    before = read_manifest(stage.output)
    manifest = run_stage(
        dataclasses.replace(stage, run=run.folder.name),
        max_failure_rate=run.config.run.max_failure_rate,
        retry_failed=run.retry_failed,
        connect=connect,
    )
    if before == manifest:
        say(manifest)
    elif manifest.num_failed:
        print(f"{manifest.stage}: reasons of failed rows: {stage.output.location}/failed", file=sys.stderr)
    say_yield(manifest)
    return before != manifest


def say_yield(manifest: Manifest) -> None:
    """Print one line for a stage of whose rows less than half are of use to what follows."""
    num_useful = manifest.rows_out - sum(manifest.unusable.values())
    if manifest.rows_out and num_useful / manifest.rows_out < LOW_YIELD:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.unusable.items())
        print(
            f"{manifest.stage}: only {num_useful} of {manifest.rows_out} rows can be used by later stages ({reasons})",
            file=sys.stderr,
        )


def say(manifest: Manifest) -> None:
    """Print one line for a stage that was finished before; a stage that runs prints its progress."""
    failed = f", {manifest.num_failed} of {manifest.rows_in} failed" if manifest.num_failed else ""
    left_out = sum(manifest.filtered.values())
    print(
        f"{manifest.stage:<13} done: {manifest.rows_out} rows{failed}{f', {left_out} left out' if left_out else ''}",
        file=sys.stderr,
    )
