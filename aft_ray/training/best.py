"""The best state of a training by the loss of its held-out examples: kept when it is found, exported at the end.

    checkpoints/<variant>/best-0000100/   what the trainer saves: an adapter, or a whole model
    checkpoints/<variant>/best.json       {"step": 100, "loss": 1.07, "proof_loss": 0.91}

best.json names the folder by its step and is written after it, so that a killed worker leaves the last best or the new
one. `proof_loss` is the loss on the batch of the proof (proof.py), which what is exported must have again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from aft_ray.storage import Folder

BEST = "best.json"


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best state so far."""

    step: int
    loss: float
    """Mean loss over the target tokens of the held-out examples of the variant in training."""
    proof_loss: float

    @property
    def folder(self) -> str:
        return f"best-{self.step:07d}"


def kept_best(folder: Folder) -> Best | None:
    """Return the best state that is kept in the folder of a training, or None."""
    return Best(**json.loads(folder.read_bytes(BEST))) if folder.exists(BEST) else None


def keep_best(folder: Folder, best: Best, saved: Path) -> None:
    """Keep what was saved in a local folder as the best state, in place of an earlier one."""
    place = folder.child(best.folder)
    with place.reached("written"):
        place.fs.create_dir(place.path, recursive=True)
        pafs.copy_files(str(saved), place.path, pafs.LocalFileSystem(), place.fs)
    folder.write_bytes(BEST, json.dumps(dataclasses.asdict(best)).encode())
    forget_best(folder, but=best)


def fetch_best(folder: Folder, best: Best, into: Path) -> None:
    """Copy the files of the best state into a local folder."""
    place = folder.child(best.folder)
    with place.reached("read"):
        pafs.copy_files(place.path, str(into), place.fs, pafs.LocalFileSystem())


def forget_best(folder: Folder, but: Best | None = None) -> None:
    """Remove the files of every best state but one; best.json stays and tells its step."""
    for name in folder.folder_names():
        if name.startswith("best-") and (but is None or name != but.folder):
            folder.remove_folder(name)


def evaluations_since_best(losses: Sequence[float]) -> int:
    """Return how many evaluations came after the one with the lowest loss.

    >>> evaluations_since_best([1.9, 1.2, 1.4, 1.3])
    2
    """
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
