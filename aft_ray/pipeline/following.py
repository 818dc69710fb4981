"""Following a job: its log as it grows, over as many connections as it takes, and at the end its exit code.

A stream of logs ends when the job does, but also when a proxy closes it, when a line is too long for a connection on
the way (ray#51601), or when the head starts again (ray#57002, ray#60665). So the job's state decides: until that is
final the stream is opened again, and what was printed before is left out.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time

from aft_ray.errors import ClusterError
from aft_ray.pipeline.job_server import Job, JobServer, UnknownJob

POLL_S = 0.5
RETRY_S = 1.0
PATIENCE_S = 900.0
"""For so long a job server may be away, as when the head starts again, before following ends."""
INTERRUPTED = 130


class Printed:
    """The part of a job's log that is on the screen. Every stream begins at the beginning of the log."""

    def __init__(self) -> None:
        self.length = 0

    def show(self, text: str, start: int) -> int:
        """Print what is new of a piece of the log that begins at character `start`, and return where it ends."""
        end = start + len(text)
        if end > self.length:
            print(text[max(0, self.length - start) :], end="", flush=True)
            self.length = end
        return end


def follow(server: JobServer, job: str) -> int:
    """Print the log of a job until its state is final, and return the exit code of the job.

    With Ctrl-C the job goes on: it is said how to follow it again or to stop it, and 130 is returned. Raises
    ClusterError for a server that stays away, and for one that has forgotten the job.
    """
    try:
        ended = _follow(server, job)
    except KeyboardInterrupt:
        print(f"\njob {job} continues. {how_to(server, job)}", file=sys.stderr, flush=True)
        return INTERRUPTED
    return exit_code_of(ended)


def how_to(server: JobServer, job: str) -> str:
    """Return the commands that follow and stop a job."""
    at = f"{job} --address {server.address}"
    return f"To follow it: aft-ray logs {at} --follow. To stop it: aft-ray stop {at}"


def _follow(server: JobServer, job: str) -> Job:
    printed = Printed()
    while True:
        before = printed.length
        asyncio.run(_print_stream(server, job, printed))
        found = _state(server, job)
        # A stream may have lost its end. One that shows nothing new may never come past the line at which it breaks.
        if found.is_final or printed.length == before:
            _print_rest(server, job, printed)
        if found.is_final:
            return found
        time.sleep(POLL_S if printed.length > before else RETRY_S)


async def _print_stream(server: JobServer, job: str, printed: Printed) -> None:
    """Print a job's log until its stream ends, in whatever way."""
    import aiohttp

    position = 0
    try:
        async for text in server.log_stream(job):
            position = printed.show(text, position)
    except (OSError, aiohttp.ClientError):
        return


def _print_rest(server: JobServer, job: str, printed: Printed) -> None:
    try:
        printed.show(server.log(job), 0)
    except ClusterError as error:  # the node that keeps the log may be lost
        print(f"the rest of the log cannot be read: {error}", file=sys.stderr, flush=True)


def _state(server: JobServer, job: str) -> Job:
    """Return the job as the server knows it, and wait for a server that is away."""
    lost_at: float | None = None
    while True:
        try:
            found = server.job(job)
        except UnknownJob:
            raise ClusterError(
                f"the cluster knows no job {job} any more: its head was restarted and has forgotten its jobs "
                "(Ray's GCS fault tolerance keeps them). Finished work is in the run's folder; submitting the same job "
                "again continues it"
            ) from None
        except ClusterError as error:
            if lost_at is None:
                lost_at = time.monotonic()
                print(f"{error}. The job may go on; waiting for the server", file=sys.stderr, flush=True)
            if time.monotonic() - lost_at > PATIENCE_S:
                raise ClusterError(f"{error}, for {PATIENCE_S / 60:.0f} minutes. {how_to(server, job)}") from None
            time.sleep(RETRY_S)
            continue
        if lost_at is not None:
            print("the job server answers again", file=sys.stderr, flush=True)
        return found


def exit_code_of(job: Job) -> int:
    """Return the exit code of a job that has ended. Where the job's own log cannot say why, it is printed."""
    if job.status == "STOPPED":
        print(
            f"job {job.id} was stopped on request (aft-ray stop, ray job stop or the dashboard). Finished work is "
            "kept, and submitting it again continues",
            file=sys.stderr,
            flush=True,
        )
        return INTERRUPTED
    if job.exit_code is not None and 0 <= job.exit_code < 256:
        return job.exit_code
    if job.exit_code is not None and -job.exit_code in set(signal.Signals):
        name = signal.Signals(-job.exit_code).name
        print(f"job {job.id} was killed ({name}), for example because memory ran out", file=sys.stderr, flush=True)
        return 128 - job.exit_code
    if job.status == "SUCCEEDED":
        return 0
    first_line = (job.message.splitlines() or ["without a word"])[0]
    print(f"job {job.id} failed: {first_line}", file=sys.stderr, flush=True)
    return 1
