"""A watchdog process that ends the processes of an engine when the process that owns them is gone.

vLLM's engine core survives an owner that is killed with SIGKILL, for example when a node runs out of memory, and keeps
its memory or GPU. The watchdog holds the reading end of a pipe. When the owner ends, for whatever reason, the pipe
closes and the watchdog kills what the owner started. It compares start times, so it never kills a process that reuses
a pid.
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
    """Return the current descendants of this process."""
    return set(psutil.Process(os.getpid()).children(recursive=True))


def watch_over(processes: set[psutil.Process]) -> subprocess.Popen[bytes]:
    """Start a watchdog for these processes. The caller terminates it after ending them in order."""
    words = [f"{process.pid}@{process.create_time()!r}" for process in processes if process.is_running()]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *words], stdin=subprocess.PIPE, start_new_session=True)
