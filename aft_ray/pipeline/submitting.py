"""`aft-ray submit`: one of jobs/ on a cluster, through Ray's own job client."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Sequence
from pathlib import Path

from aft_ray.config import Config
from aft_ray.errors import ConfigError, EngineError

EXCLUDES = [".git", ".venv", "runs", ".cache", "**/__pycache__", "**/*.safetensors"]


def check_paths(config: Config) -> None:
    """Refuse relative paths: a job works in a copy of this folder, which is deleted when the job ends."""
    if "://" not in config.run.dir and not Path(config.run.dir).expanduser().is_absolute():
        raise ConfigError(
            f"submit: run.dir {config.run.dir} is relative, and a job runs in a temporary copy of this folder. "
            "Give an absolute path that every node sees, such as --set run.dir=/mnt/shared/quickstart"
        )


def submit_job(step: str, config: Path, overrides: Sequence[str], resume: str, address: str, *, wait: bool) -> int:
    """Submit `jobs/<step>.py` with the current folder as working directory. Returns 0 if the job succeeded, else 1."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    script = Path("jobs", f"{step}.py")
    if not script.is_file():
        known = sorted(path.stem for path in Path("jobs").glob("*.py"))
        raise ConfigError(f"submit {step}: no jobs/{step}.py here; the jobs are {', '.join(known)}")
    command = ["python", str(script), "--config", str(config), "--resume", resume]
    command += [part for override in overrides for part in ("--set", override)]
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(command), runtime_env={"working_dir": ".", "excludes": EXCLUDES})
    except (ConnectionError, RuntimeError) as error:
        raise EngineError(f"submit: the job server {address} does not take the job: {error}") from None
    print(f"submitted {job}: {shlex.join(command)}\nlogs: ray job logs {job} --address {address} --follow", flush=True)
    if not wait:
        return 0

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    return 0 if client.get_job_status(job) == JobStatus.SUCCEEDED else 1
