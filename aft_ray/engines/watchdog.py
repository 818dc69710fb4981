"""Ends an engine's processes when the process that owns them is gone, however it went.

vLLM's engine core outlives an owner that is killed with SIGKILL (a node out of memory, a lost Ray actor) and keeps
its memory or GPU. A watchdog process holds the reading end of a pipe; when the owner ends, the pipe does, and the
watchdog kills what the owner started. Pids are checked against their start times, so a reused pid is left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

SCRIPT = """
import sys, psutil
sys.stdin.buffer.read()
for word in sys.argv[1:]:
    pid, _, started = word.partition("@")
    try:
        process = psutil.Process(int(pid))
        if process.create_time() == float(started):
            process.kill()
    except psutil.Error:
        pass
"""


def children() -> set[psutil.Process]:
    """This process's descendants now."""
    return set(psutil.Process(os.getpid()).children(recursive=True))


def watch_over(processes: set[psutil.Process]) -> subprocess.Popen[bytes]:
    """A watchdog for these processes. `terminate()` it once they have been ended in order."""
    words = [f"{process.pid}@{process.create_time()!r}" for process in processes if process.is_running()]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stdin=subprocess.PIPE, start_new_session=True)
