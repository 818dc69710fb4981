"""Checkpoints of DeepSpeed's ZeRO that another number of workers has written, as this number of workers can read them.

    checkpoint/global_step10/zero_pp_rank_{0..7}_mp_rank_00_optim_states.pt     of eight workers
    cache/resharded/<task>/10/global_step10_universal/zero/<weight>/exp_avg.pt, ...

ZeRO divides the optimizer's state among the workers. DeepSpeed's universal format (Lian et al., arXiv 2406.18820) keeps
it weight by weight, and any number of workers reads it. The first worker of a node converts a checkpoint, and the
others wait for it.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aft_ray.storage import cache_dir, whole_folder
from aft_ray.training.task import TrainTask

LATEST = "latest_universal"
"""The file by which DeepSpeed finds the universal form in a checkpoint."""
PARTS = "*_optim_states.pt"
"""What each worker has written of the optimizer's state."""


@contextmanager
def readable(checkpoint: Any | None, task: TrainTask, num_workers: int) -> Iterator[str | None]:
    """Yield the folder from which `num_workers` workers continue; None where there is no checkpoint.

    It is the checkpoint itself, unless the state of its optimizer is divided among another number of workers.
    """
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        state = next(Path(folder).glob("global_step*"), None)
        num_parts = 0 if state is None else len(list(state.glob(PARTS)))
        if state is None or num_parts in (0, num_workers):
            yield folder
        else:
            yield str(_converted(Path(folder), state, task))


def is_universal(folder: str | None) -> bool:
    """Whether DeepSpeed must be told that the checkpoint is in its universal form."""
    return folder is not None and (Path(folder) / LATEST).is_file()


def forget_converted(task: TrainTask) -> None:
    """Remove what this node has converted for a task."""
    shutil.rmtree(_converted_of(task), ignore_errors=True)


def _converted_of(task: TrainTask) -> Path:
    return cache_dir() / "resharded" / task.fingerprint[:24]


def _converted(checkpoint: Path, state: Path, task: TrainTask) -> Path:
    """Return a folder of this node with the files of a checkpoint, and its ZeRO state in the universal form."""
    from deepspeed.checkpoint import ds_to_universal
    from filelock import FileLock

    place = _converted_of(task) / state.name.removeprefix("global_step")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            with whole_folder(place) as partial, contextlib.redirect_stdout(io.StringIO()):
                shutil.copytree(checkpoint, partial, ignore=lambda *_: [state.name], dirs_exist_ok=True)
                ds_to_universal.main(
                    Namespace(
                        input_folder=str(state),
                        output_folder=str(partial / f"{state.name}_universal"),
                        num_extract_workers=1,
                        num_merge_workers=1,
                        keep_temp_folder=False,
                        strict=True,
                        inject_missing_state=True,
                    )
                )
    return place
