"""source -> prompts: the first stage reads and checks every prompt, and divides them into the shards of all stages.

out   prompt_id, messages, reference, task, metadata, split, responses
on    the driver

The stage reads the source twice, so that memory stays constant: first to decide which rows are kept and which of them
are held out, then to write them. The first pass also writes two lists, each of them whole or not at all:

    prompts/failed/rows.jsonl    rows that cannot be used        {prompt_id, stage, place, error, message}
    prompts/removed.jsonl        rows removed on purpose         {prompt_id, place, reason, resembles}

A seeded hash of the conversation chooses the held-out prompts, so the choice does not depend on their order.

A source may grow: when it holds all prompts of a finished run and others, the others are added in further shards, and
the later stages make only those. Prompts of the run that are not in the source any more, or that changed, are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Self

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts.duplicates import plain_text
from aft_ray.data.prompts.removal import Sifter, raw_rows
from aft_ray.data.prompts.rows import to_prompt
from aft_ray.data.prompts.sources import source_content
from aft_ray.errors import ConfigError, InputError, TooManyFailures
from aft_ray.records import HELD_OUT, PROMPTS, TRAIN, fingerprint, prompt_id_of
from aft_ray.runs import Manifest, Run, begin, write_manifest
from aft_ray.shards import write_first_shards
from aft_ray.storage import Folder
from aft_ray.templates.control import without_surrogates

REMOVED, FAILED = "removed.jsonl", "rows.jsonl"


def make_prompts(run: Run) -> Manifest:
    """Write the `prompts/` folder of a run, or add what its source has more than the run.

    Returns the manifest as it is if the source is the one that the folder was made from, or is not there any more.
    """
    return _make(run, run.config.prompts, "prompts")


def make_evaluation_prompts(run: Run, config: PromptsConfig) -> Manifest:
    """Write `evaluation/prompts/`, the prompts of `evaluation.prompts`, in the same way."""
    try:
        return _make(run, config.model_copy(update={"held_out": 0}), "evaluation/prompts")
    except (ConfigError, InputError, TooManyFailures) as error:
        if not str(error).startswith("prompts"):
            raise
        raise type(error)(f"evaluation.{error}") from None  # which is where this set is configured


def _make(run: Run, config: PromptsConfig, stage: str) -> Manifest:
    seed, folder = run.config.run.seed, run.folder.child(stage)
    manifest = _begin(run, config, stage)
    content = source_content(config.source, config.limit)
    if manifest.status == "done" and content in {manifest.source_content, None}:
        return manifest
    _remove_unfinished(folder, manifest)
    if manifest.status != "done":
        write_manifest(folder, manifest)
    started = time.monotonic()
    survey = survey_source(config, seed, folder, manifest.files)
    found = dataclasses.replace(
        manifest, rows_in=len(survey.kept), failed=dict(survey.failed), filtered=dict(survey.filtered)
    )
    _check(run, config, folder, survey, found)
    new_rows = kept_rows(config, seed, survey)
    num_rows, files = write_first_shards(folder, new_rows, PROMPTS, config.rows_per_shard, len(manifest.files))
    done = dataclasses.replace(
        found,
        status="done",
        rows_out=manifest.rows_out + num_rows,
        seconds=round(manifest.seconds + time.monotonic() - started, 1),
        files={**manifest.files, **files},
        source_content=content,
    )
    write_manifest(folder, done)
    return done


def check_prompts(run: Run) -> None:
    """Raise ResumeRefused where the `prompts/` folder of a run was made from other settings."""
    if run.manifest("prompts") is not None:
        _begin(run, run.config.prompts, "prompts")


def _begin(run: Run, config: PromptsConfig, stage: str) -> Manifest:
    return begin(run.folder.child(stage), stage, settings_of(config, run.config.run.seed))


def _remove_unfinished(folder: Folder, manifest: Manifest) -> None:
    """Remove the shards of an attempt that did not come to its end."""
    for name in folder.names(".parquet"):
        if name not in manifest.files:
            folder.remove(name)


def _check(run: Run, config: PromptsConfig, folder: Folder, survey: Survey, manifest: Manifest) -> None:
    """Raise the error that keeps the surveyed prompts from being written."""
    if manifest.num_failed > run.config.run.max_failure_rate * manifest.rows_in:
        if manifest.status != "done":
            write_manifest(folder, manifest)
        reasons = ", ".join(f"{count} {error}" for error, count in survey.failed.most_common())
        raise TooManyFailures(
            f"prompts: {manifest.num_failed} of {manifest.rows_in} rows failed ({reasons}), more than "
            f"run.max_failure_rate {run.config.run.max_failure_rate:g} allows. The first: {survey.first_failure}. "
            f"{_lists(folder)}. Fix the source and choose another run.dir, or raise the rate"
        )
    num_kept = sum(survey.kept) + manifest.rows_out
    if num_kept == 0:
        raise InputError(
            f"prompts.source {config.source}: all {manifest.rows_in} rows were removed or failed. {_lists(folder)}"
        )
    if not manifest.rows_out and survey.num_held_out >= num_kept:
        raise ConfigError(
            f"prompts.held_out {config.held_out} leaves none of the {num_kept} prompts for training. "
            f"Set prompts.held_out below {num_kept}, or use a source with more prompts"
        )


FREE = {"source", "license", "description", "limit", "on_bad_row", "rows_per_shard", "decontaminate"}
"""Settings that may change: the rows of a run tell themselves whether its source is the same."""


def settings_of(config: PromptsConfig, seed: int) -> dict[str, Any]:
    """Return the settings that determine the prompts, and hashes of the evaluation sets that they name."""
    return {
        "prompts": config.model_dump(mode="json", exclude=FREE),
        "seed": seed,
        "decontaminate": [source_content(source, None) or source for source in config.decontaminate],
    }


# ── first pass ────────────────────────────────────────────────────────────────────────────────────────────────────────


class HeldOut:
    """Chooses the `num` conversations with the lowest seeded hashes of their ids among those seen so far.

    A conversation is told by its plain text: what differs only in case, spacing or system message is held out with it,
    so no held-out prompt is trained on in another spelling.
    """

    def __init__(self, num: int, seed: int) -> None:
        self.num, self.seed = num, seed
        self._heap: list[tuple[int, str]] = []
        """Pairs of (minus hash, plain text), so that the highest hash is on top."""
        self.texts: set[str] = set()
        """Hashes of the plain texts of the held-out conversations."""

    def see(self, content_id: str, text: str) -> None:
        if text in self.texts:
            return
        digest = hashlib.blake2b(f"held_out/{self.seed}/{content_id}".encode(), digest_size=16).digest()
        heapq.heappush(self._heap, (-int.from_bytes(digest, "big"), text))
        self.texts.add(text)
        if len(self._heap) > self.num:
            self.texts.discard(heapq.heappop(self._heap)[1])


def text_hash(row: Mapping[str, Any]) -> str:
    """Return a hash of what a prompt asks, whatever its case, spacing and system message."""
    return hashlib.blake2b(plain_text(row["messages"]).encode(errors="replace"), digest_size=16).hexdigest()


@dataclasses.dataclass(kw_only=True)
class Survey:
    """The result of the first pass."""

    sifter: Sifter
    kept: bytearray
    """1 for each row of the source that is written now, 0 for each other row."""
    held_out: set[str]
    """Hashes of the plain texts of the held-out conversations."""
    num_held_out: int
    """Number of the rows to write that are held out."""
    failed: Counter[str]
    """Number of failed rows by error class."""
    first_failure: str
    """Error message of the first failed row."""
    filtered: Counter[str]
    """Number of removed rows by reason."""
    digest: bytes
    """Hash of the kept prompts. The second pass must find the same."""


def survey_source(config: PromptsConfig, seed: int, folder: Folder, shards: Mapping[str, str] = {}) -> Survey:
    """Read the source once, and write the lists of failed and removed rows to `folder`, which has finished `shards`."""
    kept, held_out, digest = bytearray(), HeldOut(config.held_out, seed), hashlib.blake2b()
    failed: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    first_failure = ""
    sifter = Sifter(config, seed)
    sifter.know(rows_of(folder, shards))
    with JsonLines(folder.child("failed"), FAILED) as failures, JsonLines(folder, REMOVED) as removals:
        for sifted in sifter.sift():
            kept.append(sifted.is_kept and not sifted.is_in_run)
            if sifted.error is not None:
                what = _why(sifted.error)
                first_failure = first_failure or what["message"]
                failed[what["error"]] += 1
                failures.write({"prompt_id": None, "stage": "prompts", "place": sifted.place, **what})
            elif sifted.reason is not None:
                filtered[sifted.reason] += 1
                why = {"reason": sifted.reason, "resembles": sifted.resembles}
                removals.write({"prompt_id": sifted.row["prompt_id"], "place": sifted.place, **why})
            elif not sifted.is_in_run:
                held_out.see(prompt_id_of(sifted.row["messages"]), text_hash(sifted.row))
                digest.update(fingerprint(sifted.row).encode())
    sifter.check_run(rows_of(folder, shards))
    # A run keeps its split: what is added to it is trained on, unless it repeats what is held out.
    texts = (
        {text_hash(row) for row in rows_of(folder, shards) if row["split"] == HELD_OUT} if shards else held_out.texts
    )
    return Survey(
        sifter=sifter,
        kept=kept,
        held_out=texts,
        num_held_out=len(texts),
        failed=failed,
        first_failure=first_failure,
        filtered=filtered,
        digest=digest.digest(),
    )


def rows_of(folder: Folder, shards: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of finished shards."""
    for name in shards:
        yield from folder.read_table(name).to_pylist()


def _why(error: Exception) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)[:2000]}


def _lists(folder: Folder) -> str:
    lists = [(folder.child("failed"), FAILED), (folder, REMOVED)]
    places = [f"{place.location}/{name}" for place, name in lists if place.exists(name)]
    return f"Reasons by row: {' and '.join(places)}"


class JsonLines:
    """A file written line by line and moved into place at the end. It is whole or absent, and absent if it is empty."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        self._partial = folder.partial(name)
        self._stream: Any = None

    def write(self, line: dict[str, Any]) -> None:
        text = without_surrogates(json.dumps(line, ensure_ascii=False))
        with self.folder.reached("written", self.name):
            if self._stream is None:
                self.folder.fs.create_dir(self.folder.path, recursive=True)
                self._stream = self.folder.fs.open_output_stream(self._partial)
            self._stream.write(f"{text}\n".encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._stream is None:
            if error is None and self.folder.exists(self.name):
                self.folder.remove(self.name)
            return
        try:
            with self.folder.reached("written", self.name):
                self._stream.close()
                if error is None:
                    self.folder.fs.move(self._partial, self.folder.file(self.name))
        finally:
            with contextlib.suppress(OSError):  # it was moved, or the disk is full
                self.folder.fs.delete_file(self._partial)


# ── second pass ───────────────────────────────────────────────────────────────────────────────────────────────────────


def kept_rows(config: PromptsConfig, seed: int, survey: Survey) -> Iterator[dict[str, Any]]:
    """Yield the rows that the first pass kept, with their split."""
    digest = hashlib.blake2b()
    for number, (place, raw) in zip(range(len(survey.kept)), raw_rows(config, seed), strict=False):
        if survey.kept[number]:
            row = to_prompt(raw, config, place).row
            digest.update(fingerprint(row).encode())
            is_held_out = text_hash(row) in survey.held_out
            yield {**survey.sifter.with_group(row), "split": HELD_OUT if is_held_out else TRAIN}
    if digest.digest() != survey.digest:
        raise InputError(
            f"prompts.source {config.source}: the source changed while it was read. Run again with another run.dir"
        )
