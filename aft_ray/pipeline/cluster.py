"""Connect to the Ray cluster that a run names, or start a local one, when the first step needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from types import TracebackType

from aft_ray.config import Config
from aft_ray.cpu import let_waiting_threads_sleep
from aft_ray.errors import ClusterError
from aft_ray.pipeline.environment import check_names, check_nodes, names_needed, setup_hook
from aft_ray.pipeline.interruption import keep_sigterm
from aft_ray.serving.app import prepare_for_serving

CONNECT_WITHIN_S = 10.0
STARTS_IN = "It needs a short writable folder (RAY_TMPDIR, else /tmp) with free space, and shared memory (/dev/shm)"
WHERE = "The address is run.ray_address, or RAY_ADDRESS; without either a local cluster is started"


class RaySession:
    """A Ray connection for the time of a block. It opens at the first `connect()`, so a finished run never starts Ray.

    An address (`run.ray_address`, or `RAY_ADDRESS`, which a Ray job has set) joins that cluster; without one a local
    cluster is started and ended. A connection that is already open is used and stays open.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.address = config.run.ray_address or os.environ.get("RAY_ADDRESS") or "local"
        self.ours = False

    def connect(self) -> None:
        """Connect to Ray, and ask every node of a cluster for what the run needs of it.

        Every call but the first does nothing. Raises ConfigError for variables that are missing, and for a node that
        does not see the run's folder; ClusterError for a cluster that cannot be reached.
        """
        check_names(names_needed(self.config), self.config.run.environment_file)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Ray's C++ core prints what its own restarts already mend; a cluster that is joined keeps its own level.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        prepare_for_serving()  # the evaluation serves
        let_waiting_threads_sleep()
        import ray

        if ray.is_initialized():
            return
        dashboard = False if self.address == "local" else None
        if self.address == "local":  # at Ray's own 15 the workers starve beside any other busy process (LOG.md)
            os.environ.setdefault("RAY_worker_niceness", "0")
        logs = None
        if self.config.run.log_format == "json":
            logs = ray.LoggingConfig(encoding="JSON", log_level="WARNING")
        hook = setup_hook(self.config)
        check_answers(self.address)
        try:
            with _kept_back_unless_it_fails(), keep_sigterm():
                ray.init(
                    address=self.address,
                    logging_level=logging.ERROR,
                    logging_config=logs,
                    log_to_driver=False,
                    include_dashboard=dashboard,
                    runtime_env={"worker_process_setup_hook": hook} if hook else None,
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            if self.address == "local":
                raise ClusterError(f"Ray cannot start on this machine: {_first_line(error)}. {STARTS_IN}") from error
            raise ClusterError(f"no Ray cluster at {self.address}: {_first_line(error)}. {WHERE}") from error
        self.ours = True
        context = ray.data.DataContext.get_current()  # one progress line of ours instead of a page of Ray Data's
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        # As for workers: failed rows are in failed/, and the reason why a text has no score is beside it.
        for name in ("aft_ray.shards", "aft_ray.data.verifiers"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if self.address != "local":
            check_nodes(self.config)

    def __enter__(self) -> RaySession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ours:
            import ray

            ray.shutdown()
        if error is not None and (lost := what_was_lost(error)):
            raise ClusterError(f"{lost}. Finished work is kept, and the same command continues") from error


def check_answers(address: str) -> None:
    """Raise ClusterError when nothing listens at a `host:port`. Ray itself would try for two minutes and then exit.

    `auto` is the cluster of this machine, as Ray finds it.
    """
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = canonicalize_bootstrap_address(address) or address
        except (ConnectionError, ValueError) as error:
            raise ClusterError(f"no Ray cluster on this machine: {_first_line(error)}. {WHERE}") from error
    host, separator, port = address.rpartition(":")
    if not separator or "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}. {WHERE}") from error


def what_was_lost(error: BaseException) -> str:
    """Return what an exception of Ray says of the cluster; empty for one of the program, which keeps its traceback."""
    import ray

    if isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause if isinstance(error.cause, Exception) else error
    of_the_program = (ray.exceptions.RayTaskError, ray.exceptions.UserCodeException)
    if not isinstance(error, ray.exceptions.RayError) or isinstance(error, of_the_program):
        return ""
    return f"the Ray cluster failed: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


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
