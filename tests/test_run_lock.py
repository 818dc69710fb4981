"""One command at a time owns a run folder, on a file system and on object storage."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aft_ray import run_lock
from aft_ray.errors import RunInUse
from aft_ray.run_lock import Claim, RunLock, is_claim
from aft_ray.storage import Folder

PROCESSES = multiprocessing.get_context("forkserver")


@pytest.fixture(params=["here", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        return Folder.at(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")
    return Folder.at(tmp_path / "run")


def claims(folder: Folder) -> list[Claim]:
    return [Claim(**json.loads(folder.read_bytes(name))) for name in folder.files() if is_claim(name)]


def put(folder: Folder, **changes: object) -> Claim:
    """Leave the claim of an owner, by default of a process of this machine that has ended."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    claim = dataclasses.replace(RunLock(folder).claim, token="0" * 12, pid=gone.pid, is_owner=True)
    claim = dataclasses.replace(claim, **changes)  # type: ignore[arg-type]
    folder.write_bytes(claim.file, json.dumps(dataclasses.asdict(claim)).encode())
    return claim


def test_the_second_command_is_refused_with_the_owner_s_name_and_the_next_one_is_not(folder: Folder) -> None:
    with RunLock(folder):
        [owner] = claims(folder)
        assert owner.is_owner
        with pytest.raises(RunInUse) as refused, RunLock(folder):
            pass
        assert f"is in use by another command: pid {os.getpid()} on {socket.gethostname()}" in str(refused.value)
        assert refused.value.exit_code == 4
        assert claims(folder) == [owner]
    assert claims(folder) == []
    with RunLock(folder):
        assert len(claims(folder)) == 1


def hold(location: str, started: object, ended: object) -> None:
    with RunLock(Folder.at(location)):
        started.set()  # type: ignore[attr-defined]
        ended.wait(60)  # type: ignore[attr-defined]


@contextlib.contextmanager
def owner_in_another_process(folder: Folder) -> Iterator[multiprocessing.process.BaseProcess]:
    started, ended = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(folder.location, started, ended))
    process.start()
    try:
        assert started.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def test_a_killed_owner_is_followed_at_once_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    with owner_in_another_process(folder) as owner:
        assert owner.pid is not None
        os.kill(owner.pid, signal.SIGSTOP)
        with pytest.raises(RunInUse, match=f"pid {owner.pid} "), RunLock(folder):
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.join()
        with RunLock(folder):
            assert [claim.pid for claim in claims(folder)] == [os.getpid()]


def test_a_pid_that_another_process_got_does_not_keep_a_dead_owner_alive(folder: Folder) -> None:
    claim = put(folder, pid=os.getpid(), started=1.0)
    assert claim.is_alive(silent_s=10)
    assert not claim.is_alive(silent_s=1000)


def test_an_owner_on_another_machine_is_believed_as_long_as_it_gives_signs_of_life(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, machine="elsewhere", host="node-7")
    with pytest.raises(RunInUse, match=r"pid \d+ on node-7, .*its last sign of life \d s ago; if it is dead"):
        RunLock(folder).__enter__()
    assert len(claims(folder)) == 1
    monkeypatch.setattr(run_lock, "DEAD_AFTER_S", 0.0)
    time.sleep(1.1)  # object storage tells whole seconds
    with RunLock(folder):
        assert [claim.machine for claim in claims(folder)] == [run_lock.this_machine()]


@pytest.mark.parametrize("attempt", range(3))
def test_of_many_commands_that_start_together_exactly_one_owns_the_folder(folder: Folder, attempt: int) -> None:
    barrier, over = threading.Barrier(6), threading.Event()
    owned: list[str] = []
    refused: list[RunInUse] = []

    def start() -> None:
        barrier.wait()
        try:
            with RunLock(folder) as lock:
                owned.append(lock.claim.token)
                over.wait(30)
        except RunInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while len(owned) + len(refused) < 6 and time.monotonic() < end:
        time.sleep(0.01)
    over.set()
    for thread in threads:
        thread.join()
    assert (len(owned), len(refused)) == (1, 5)
    assert claims(folder) == []


def test_an_owner_that_lost_its_claim_stops(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.3)
    with pytest.raises(RunInUse, match="another one owns the run folder now"), RunLock(folder) as lock:
        time.sleep(0.7)
        assert claims(folder) == [lock.claim], "it gave signs of life and stayed"
        lost = dataclasses.replace(lock.claim, token="f" * 12)
        monkeypatch.setattr(lock, "claim", lost)
        time.sleep(3)


def test_an_owner_that_was_suspended_finds_the_next_one(folder: Folder) -> None:
    with RunLock(folder) as lock:
        assert lock._is_still_ours()
        put(folder, machine="elsewhere")
        assert lock._is_still_ours(), "another command may look, but cannot own the folder"
        lock._last_sign -= 1000
        assert not lock._is_still_ours()
