"""SIGTERM ends a run as Ctrl-C does: with what it has finished kept, its application ended, and one sentence."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopRequested(KeyboardInterrupt):
    """The process was asked to end by SIGTERM. The message says by whom, as far as that can be known."""


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Raise StopRequested in the main thread at SIGTERM, for the time of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(*_: Any) -> None:
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # Ray sends it to a job for no other reason
        raise StopRequested("stopped on request (aft-ray stop, ray job stop or the dashboard)")
    raise StopRequested("stopped by SIGTERM")


@contextlib.contextmanager
def keep_sigterm() -> Iterator[None]:
    """Keep the process's own handler of SIGTERM where the block replaces it, as `ray.init` does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
