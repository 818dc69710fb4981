"""`aft-ray jobs`, `logs`, `status` and `stop`: what a cluster knows of the jobs that were submitted to it."""

from __future__ import annotations

import re
import time
from pathlib import Path

from aft_ray.errors import ConfigError
from aft_ray.pipeline.following import exit_code_of, follow
from aft_ray.pipeline.job_server import Job, JobServer
from aft_ray.pipeline.run_status import holds_run, print_run

JOB_PREFIX = "raysubmit_"
JOB_ID = re.compile(rf"{JOB_PREFIX}[A-Za-z0-9]{{16}}")
"""How Ray names jobs. One that was submitted by other means may have another id."""
LINE_OF_JOB = "{:<26} {:<9} {:<12} {:<19}  {:<12} {:<20} {}"


def print_jobs(address: str) -> None:
    """Print the jobs of a cluster, the newest first."""
    found = JobServer.at(address).jobs()
    if not found:
        print("no jobs yet")
        return
    print(LINE_OF_JOB.format("job", "state", "step", "started", "took", "by", "run"))
    for job in found:
        about = job.metadata
        what = ", ".join(job.runs) or " ".join(job.entrypoint.split())[:60]
        words = (about.get("step", "–"), _clock(job.started), _took(job), about.get("by", "–"), what)
        print(LINE_OF_JOB.format(job.id, job.status, *words))


def print_logs(address: str, job: str, *, following: bool) -> int:
    """Print the log of a job, and with `following` all that comes until its end. Returns 0, or the job's exit code."""
    server = JobServer.at(address)
    if not following:
        print(server.log(job), end="")
        return 0
    server.job(job)
    return follow(server, job)


def print_status(address: str, job_or_run: str) -> None:
    """Print how a run goes: of a folder, or of a job, and then of the job's run where that can be seen from here."""
    if "/" in job_or_run or Path(job_or_run).is_dir():
        if "://" not in job_or_run and not Path(job_or_run).expanduser().is_dir():
            raise ConfigError(f"{job_or_run}: there is no such run folder")
        if not holds_run(job_or_run):
            raise ConfigError(f"{job_or_run} holds no run: there is no config.resolved.yaml")
        print_run(job_or_run)
        return
    job = _job(address, job_or_run)
    print(f"{job.id}: {job.status}, {_took(job)} since {_clock(job.started)}\n{job.entrypoint}")
    if job.metadata.get("by"):
        print(f"submitted by {job.metadata['by']}")
    if job.is_final:
        print(f"exit code {exit_code_of(job)}")
    for run in job.runs:
        if holds_run(run):
            print_run(run)
        else:
            print(f"run {run}: not visible from here, or not begun")


def _job(address: str, name: str) -> Job:
    """Return a job. Raises ConfigError, which says what else the name may have been meant for: most often a folder."""
    try:
        return JobServer.at(address).job(name)
    except ConfigError as error:
        if JOB_ID.fullmatch(name):
            raise
        if name.startswith(JOB_PREFIX):
            what = f"{name}: this is no complete id of a job. An id is"
        else:
            what = f"{name}: there is no such run folder here. If you mean a job: its id is"
        raise ConfigError(
            f"{what} {JOB_PREFIX} and 16 letters and digits; `aft-ray jobs` lists the ids ({error})"
        ) from None


def stop_job(address: str, job: str) -> None:
    """Ask a job to end, and wait until it has. What it has finished is kept."""
    server = JobServer.at(address)
    if server.job(job).is_final or not server.stop(job):
        print(f"{job} had ended already: {server.job(job).status}")
        return
    print(f"{job} is asked to stop", flush=True)
    while not (found := server.job(job)).is_final:
        time.sleep(0.5)
    print(f"{job}: {found.status}. Finished work is kept; submitting it again continues")


def _clock(unix: float | None) -> str:
    return "–" if unix is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix))


def _took(job: Job) -> str:
    if job.started is None:
        return "–"
    seconds = round((job.ended or time.time()) - job.started)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds % 60:02} s"
