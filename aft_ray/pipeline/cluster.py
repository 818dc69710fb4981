"""Connect to the Ray cluster that a run names, or start a local one, when the first step needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from types import TracebackType

from aft_ray.config import Config
from aft_ray.cpu import let_waiting_threads_sleep
from aft_ray.serving.app import give_http_time_to_start


class RaySession:
    """A Ray connection for the time of a block. It opens at the first `connect()`, so a finished run never starts Ray.

    An address (`run.ray_address`, or `RAY_ADDRESS`, which a Ray job has set) joins that cluster; without one a local
    cluster is started and ended. A connection that is already open is used and stays open.
    """

    def __init__(self, config: Config) -> None:
        self.address = config.run.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        self.ours = False

    def connect(self) -> None:
        """Connect to Ray. Every call but the first does nothing."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Ray's C++ core prints what its own restarts already mend; a cluster that is joined keeps its own level.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        give_http_time_to_start()  # the evaluation serves
        let_waiting_threads_sleep()
        import ray

        if ray.is_initialized():
            return
        dashboard = False if self.address == "local" else None
        if self.address == "local":  # at Ray's own 15 the workers starve beside any other busy process (LOG.md)
            os.environ.setdefault("RAY_worker_niceness", "0")
        with _kept_back_unless_it_fails():
            ray.init(
                address=self.address, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=dashboard
            )
        self.ours = True
        context = ray.data.DataContext.get_current()  # one progress line of ours instead of a page of Ray Data's
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def __enter__(self) -> RaySession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ours:
            import ray

            ray.shutdown()


@contextlib.contextmanager
def _kept_back_unless_it_fails() -> Iterator[None]:
    """Hold back what Ray's C++ core writes to stderr while it starts, and print it only if Ray cannot start."""
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
