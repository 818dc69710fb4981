"""One command at a time owns a run folder, on a file system and on object storage alike.

with RunLock(folder):        # raises RunInUse, which names the owner
    ...

runs/<name>/owner-<token>.json     a claim: host, pid, since when, and a sign of life every 20 seconds

A command writes its claim, and then lists all claims. It owns the folder when it sees no other command's claim. Two
commands can never both see none: whichever lists later sees the claim that the other had written before its own list.
So a store needs no more than lists that show what was written, which every file system and object store has. Of
commands that start together, the one with the smallest token waits for the others to withdraw.

A claim outlives a crash, and is then not obeyed: its process is gone from this machine, or, where the claim came from
another machine, there was no sign of life for three minutes. Ages are differences of the storage's own times, so the
clocks of the machines do not matter. An owner that was suspended for so long finds its claim gone, and stops.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from aft_ray.errors import RunInUse, StorageError
from aft_ray.storage import Folder

logger = logging.getLogger(__name__)

CLAIM = "owner-"
BEAT_S = 20.0
"""Seconds between two signs of life."""
DEAD_AFTER_S = 180.0
"""A claim from another machine without a sign of life for so many seconds is not obeyed."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a command says of itself while it owns, or wants to own, a run folder."""

    token: str
    host: str
    machine: str
    """Host, boot and process namespace: where pids mean the same processes."""
    pid: int
    started: float
    """When the process started, since pids are used again."""
    since: str
    is_owner: bool = False
    """False while it still looks for other claims."""

    @property
    def file(self) -> str:
        return f"{CLAIM}{self.token}.json"

    def is_alive(self, silent_s: float) -> bool:
        """Return whether the command is still at work, `silent_s` seconds after its last sign of life."""
        if self.machine == this_machine():
            started = process_start(self.pid)
            if started is None:
                return False
            if abs(started - self.started) < 2:  # the same process, even if it is stopped
                return True
        return silent_s < DEAD_AFTER_S


class RunLock:
    """The ownership of a run folder for the time of a block."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.claim = Claim(
            token=uuid4().hex[:12],
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            started=process_start(os.getpid()) or 0.0,
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="owner of the run folder")
        self._is_lost = False
        self._last_sign = 0.0

    def __enter__(self) -> RunLock:
        self._write()
        try:
            self._wait_for_the_others()
        except BaseException:
            self._withdraw()
            raise
        self.claim = dataclasses.replace(self.claim, is_owner=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._is_lost:
            self._withdraw()
            raise RunInUse(
                f"{self.folder.location}: this command gave no sign of life for {DEAD_AFTER_S:.0f} s, and another one "
                "owns the run folder now. Finished work is kept"
            ) from error
        self._withdraw()

    def _write(self) -> None:
        self.folder.write_bytes(self.claim.file, json.dumps(dataclasses.asdict(self.claim)).encode())
        self._last_sign = time.time()

    def _withdraw(self) -> None:
        try:
            self._remove(self.claim.file)
        except StorageError as error:  # the storage is gone; the claim ends by itself
            logger.warning("%s", error)

    def _remove(self, name: str) -> None:
        try:
            self.folder.remove(name)
        except StorageError:
            if self.folder.exists(name):  # otherwise another command was faster
                raise

    def _wait_for_the_others(self) -> None:
        """Return when no other command has a claim. Raises RunInUse if another one comes first."""
        while others := self._living_others():
            owner = next((claim for claim, _ in others if claim.is_owner), None)
            first, silent_s = min(others, key=lambda other: (other[0] is not owner, other[0].token))
            if owner is not None or first.token < self.claim.token:
                raise RunInUse(self._sentence(first, silent_s))
            time.sleep(0.1)
            self._write()  # the ages of the others are told from its time

    def _living_others(self) -> list[tuple[Claim, float]]:
        """Return the claims of other commands that are alive, each with the seconds since its last sign of life.

        Those of dead commands are removed.
        """
        files = {name: info for name, info in self.folder.files().items() if is_claim(name)}
        now = files[self.claim.file].mtime_ns if self.claim.file in files else time.time_ns()
        living = []
        for name, info in files.items():
            silent_s = (now - (info.mtime_ns or now)) / 1e9
            if name == self.claim.file or (claim := self._read(name)) is None:
                continue
            if claim.is_alive(silent_s):
                living.append((claim, max(silent_s, 0.0)))
            else:
                self._remove(name)
        return living

    def _read(self, name: str) -> Claim | None:
        for _ in range(10):
            try:
                return Claim(**json.loads(self.folder.read_bytes(name)))
            except ValueError:  # it was written again while it was read
                time.sleep(0.05)
            except (FileNotFoundError, StorageError):
                if self.folder.exists(name):
                    raise
                return None  # it was withdrawn after it was listed
        raise StorageError(
            f"{self.folder.location}/{name} cannot be read as a claim on this run; remove it if no command runs"
        )

    def _sentence(self, owner: Claim, silent_s: float) -> str:
        text = (
            f"{self.folder.location} is in use by another command: pid {owner.pid} on {owner.host}, since {owner.since}"
        )
        if owner.machine != this_machine():
            text += (
                f", with its last sign of life {silent_s:.0f} s ago; if it is dead, the folder is free "
                f"{DEAD_AFTER_S:.0f} s after that"
            )
        return f"{text}. Wait until it ends, or choose another run.dir"

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if self._is_still_ours():
                    continue
            except StorageError as error:  # it may come back
                logger.warning("%s", error)
                continue
            self._is_lost = True
            os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread, wherever it waits
            return

    def _is_still_ours(self) -> bool:
        """Give a sign of life, and return whether the claim was obeyed until now."""
        if not self.folder.exists(self.claim.file):
            return False
        is_late = time.time() - self._last_sign > DEAD_AFTER_S / 2
        self._write()
        # It may have been removed just before it was written again.
        return not (is_late and any(claim.is_owner for claim, _ in self._living_others()))


def owner_of(folder: Folder) -> Claim | None:
    """Return the command that is at work on a run folder, or None. Nothing is changed, so anybody may ask."""
    for name, info in folder.files().items():
        if is_claim(name):
            try:
                claim = Claim(**json.loads(folder.read_bytes(name)))
            except (FileNotFoundError, ValueError):  # it has just ended, or is being written
                continue
            if claim.is_owner and claim.is_alive(time.time() - (info.mtime_ns or 0) / 1e9):
                return claim
    return None


def is_claim(name: str) -> bool:
    """Return whether a file in a run folder is a claim."""
    return name.startswith(CLAIM) and name.endswith(".json")


def this_machine() -> str:
    """Return what tells this set of processes from all others: host name, boot, and the namespace of its pids."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    parts += [boot.read_text().strip()] if boot.is_file() else []
    parts += [os.readlink(namespace)] if namespace.is_symlink() else []
    return "/".join(parts)


def process_start(pid: int) -> float | None:
    """Return when a process of this machine started, in seconds; None if there is no such process any more."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
