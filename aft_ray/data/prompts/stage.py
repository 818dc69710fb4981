"""source -> prompts: the first stage reads and checks every prompt, and divides them into the shards of all stages.

out   prompt_id, messages, reference, task, metadata, split, responses
on    the driver

The stage reads the source twice, so that memory stays constant: first to decide which rows are kept and which of them
are held out, then to write them. The first pass also writes two lists, each of them whole or not at all:

    prompts/failed/rows.jsonl    rows that cannot be used        {prompt_id, stage, place, error, message}
    prompts/removed.jsonl        rows removed on purpose         {prompt_id, place, reason, resembles}

A seeded hash of the prompt id chooses the held-out prompts, so the choice does not depend on their order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts.removal import raw_rows, sift
from aft_ray.data.prompts.rows import to_prompt
from aft_ray.errors import ConfigError, InputError, TooManyFailures
from aft_ray.records import HELD_OUT, PROMPTS, TRAIN
from aft_ray.runs import Manifest, Run, begin, write_manifest
from aft_ray.shards import finish_without_source, write_first_shards
from aft_ray.storage import Folder
from aft_ray.templates.control import without_surrogates

REMOVED, FAILED = "removed.jsonl", "rows.jsonl"


def make_prompts(run: Run) -> Manifest:
    """Write the `prompts/` folder of a run, or return its manifest if it is already complete."""
    config, seed = run.config.prompts, run.config.run.seed
    folder = run.folder.child("prompts")
    manifest = begin(folder, "prompts", settings_of(config, seed))
    if manifest.status == "done":
        return manifest
    write_manifest(folder, manifest)
    started = time.monotonic()
    survey = survey_source(config, seed, folder)
    manifest = dataclasses.replace(
        manifest, rows_in=len(survey.kept), failed=dict(survey.failed), filtered=dict(survey.filtered)
    )
    if manifest.num_failed > run.config.run.max_failure_rate * manifest.rows_in:
        write_manifest(folder, manifest)
        reasons = ", ".join(f"{count} {error}" for error, count in survey.failed.most_common())
        raise TooManyFailures(
            f"prompts: {manifest.num_failed} of {manifest.rows_in} rows failed ({reasons}), more than "
            f"run.max_failure_rate {run.config.run.max_failure_rate:g} allows. The first: {survey.first_failure}. "
            f"{_lists(folder)}. Fix the source and choose another run.dir, or raise the rate"
        )
    num_kept = sum(survey.kept)
    if num_kept == 0:
        raise InputError(
            f"prompts.source {config.source}: all {manifest.rows_in} rows were removed or failed. {_lists(folder)}"
        )
    if config.held_out >= num_kept:
        raise ConfigError(
            f"prompts.held_out {config.held_out} leaves none of the {num_kept} prompts for training. "
            f"Set prompts.held_out below {num_kept}, or use a source with more prompts"
        )
    num_rows = write_first_shards(folder, kept_rows(config, seed, survey), PROMPTS, config.rows_per_shard)
    manifest = dataclasses.replace(manifest, seconds=round(time.monotonic() - started, 1))
    return finish_without_source(folder, manifest, rows_in=manifest.rows_in, rows_out=num_rows)


def settings_of(config: PromptsConfig, seed: int) -> dict[str, Any]:
    """Return everything that determines the prompts: the settings, and hashes of the files that they name."""
    return {
        "prompts": config.model_dump(mode="json"),
        "seed": seed,
        "source_sha256": source_sha256(config.source),
        "decontaminate_sha256": {source: source_sha256(source) for source in config.decontaminate},
    }


def source_sha256(source: str) -> str | None:
    """Return the hash of a source that is a local file, or None. An edited file must not resume the old run."""
    path = Path(source)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── first pass ────────────────────────────────────────────────────────────────────────────────────────────────────


class HeldOut:
    """Chooses the `num` prompts with the lowest seeded hashes of prompt_id among those seen so far."""

    def __init__(self, num: int, seed: int) -> None:
        self.num, self.seed = num, seed
        self._heap: list[tuple[int, int]] = []
        """Pairs of (minus hash, row number), so that the highest hash is on top."""

    def see(self, prompt_id: str, row_number: int) -> None:
        digest = hashlib.blake2b(f"held_out/{self.seed}/{prompt_id}".encode(), digest_size=16).digest()
        heapq.heappush(self._heap, (-int.from_bytes(digest, "big"), row_number))
        if len(self._heap) > self.num:
            heapq.heappop(self._heap)

    @property
    def rows(self) -> set[int]:
        """The row numbers of the held-out prompts."""
        return {row_number for _, row_number in self._heap}


@dataclasses.dataclass(kw_only=True)
class Survey:
    """The result of the first pass."""

    kept: bytearray
    """1 for each row of the source that is kept, 0 for each other row."""
    held_out: set[int]
    """The row numbers of the held-out prompts."""
    failed: Counter[str]
    """Number of failed rows by error class."""
    first_failure: str
    """Error message of the first failed row."""
    filtered: Counter[str]
    """Number of removed rows by reason."""
    digest: bytes
    """Hash of the ids of the kept prompts. The second pass must find the same."""


def survey_source(config: PromptsConfig, seed: int, folder: Folder) -> Survey:
    """Read the source once, and write the lists of failed and removed rows to `folder`."""
    kept, held_out, digest = bytearray(), HeldOut(config.held_out, seed), hashlib.blake2b()
    failed: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    first_failure = ""
    with JsonLines(folder.child("failed"), FAILED) as failures, JsonLines(folder, REMOVED) as removals:
        for number, sifted in enumerate(sift(config, seed)):
            kept.append(sifted.is_kept)
            if sifted.error is not None:
                what = _why(sifted.error)
                first_failure = first_failure or what["message"]
                failed[what["error"]] += 1
                failures.write({"prompt_id": None, "stage": "prompts", "place": sifted.place, **what})
            elif sifted.reason is not None:
                filtered[sifted.reason] += 1
                why = {"reason": sifted.reason, "resembles": sifted.resembles}
                removals.write({"prompt_id": sifted.row["prompt_id"], "place": sifted.place, **why})
            else:
                held_out.see(sifted.row["prompt_id"], number)
                digest.update(f"{sifted.row['prompt_id']}\n".encode())
    return Survey(
        kept=kept,
        held_out=held_out.rows,
        failed=failed,
        first_failure=first_failure,
        filtered=filtered,
        digest=digest.digest(),
    )


def _why(error: Exception) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)[:2000]}


def _lists(folder: Folder) -> str:
    return f"Reasons by row: {folder.path}/failed/{FAILED} and {folder.path}/{REMOVED}"


class JsonLines:
    """A file written line by line and moved into place at the end. It is whole or absent, and absent if it is empty."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self._partial = folder.partial(name)
        self._stream: Any = None

    def write(self, line: dict[str, Any]) -> None:
        if self._stream is None:
            self.folder.fs.create_dir(self.folder.path, recursive=True)
            self._stream = self.folder.fs.open_output_stream(self._partial)
        text = without_surrogates(json.dumps(line, ensure_ascii=False))
        self._stream.write(f"{text}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()
        if error is not None:
            return  # the partial file is never read
        if self._stream is not None:
            self.folder.fs.move(self._partial, self.folder.file(self.name))
        elif self.folder.exists(self.name):
            self.folder.remove(self.name)


# ── second pass ───────────────────────────────────────────────────────────────────────────────────────────────────


def kept_rows(config: PromptsConfig, seed: int, survey: Survey) -> Iterator[dict[str, Any]]:
    """Yield the rows that the first pass kept, with their split."""
    digest = hashlib.blake2b()
    for number, (place, raw) in zip(range(len(survey.kept)), raw_rows(config, seed), strict=False):
        if survey.kept[number]:
            row, _ = to_prompt(raw, config, place)
            digest.update(f"{row['prompt_id']}\n".encode())
            yield {**row, "split": HELD_OUT if number in survey.held_out else TRAIN}
    if digest.digest() != survey.digest:
        raise InputError(
            f"prompts.source {config.source}: the source changed while it was read. Run again with another run.dir"
        )
