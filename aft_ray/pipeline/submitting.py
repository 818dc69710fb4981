"""`aft-ray submit`: a step of the line, or all of it, as a job on a cluster, through Ray's own job client."""

from __future__ import annotations

import getpass
import shlex
import socket
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from aft_ray.config import Config
from aft_ray.errors import ConfigError
from aft_ray.pipeline import LINE
from aft_ray.pipeline.following import follow, how_to
from aft_ray.pipeline.job_server import RUNS, JobServer
from aft_ray.pipeline.upload import Upload, joined, upload_of
from aft_ray.storage import Folder

WHOLE_LINE = "pipeline"
STOP_WITHIN_S = 60
"""Ray kills a job that was asked to stop after so long; its own 3 s are too short to end what the job serves."""


def submit_job(
    step: str, config_files: Sequence[str], configs: Sequence[Config], overrides: Sequence[str], resume: str,
    address: str, *, wait: bool,
) -> int:  # fmt: skip
    """Submit a step with what it needs from this folder, and return the exit code of its job (0 without `wait`).

    Several configs are one job, which runs the whole line of one after the other (`sweep.py`). Raises ConfigError for a
    step that does not exist, for what cannot travel and for a job server that cannot be reached, EngineError for one
    that does not take the job.
    """
    if len(configs) > 1 and step != WHOLE_LINE:
        raise ConfigError(f"submit {step}: several configs are several runs of the whole line: submit {WHOLE_LINE}")
    entry = _entry(step) if len(configs) == 1 else ["python", "-m", "aft_ray", "run"]
    return send([*entry, "--resume", resume], step, config_files, configs, overrides, address, wait=wait)


def send(
    entry: Sequence[str], step: str, config_files: Sequence[str], configs: Sequence[Config],
    overrides: Sequence[str], address: str, *, wait: bool,
) -> int:  # fmt: skip
    """Submit a command that takes `--config` and `--set`, with what it needs from this folder. See `submit_job`."""
    for config in configs:
        check_place(config)
    uploads = [upload_of(file, config) for file, config in zip(config_files, configs, strict=True)]
    upload = joined(uploads)
    archive = upload.archive()
    server = JobServer.at(address)
    command = [*entry, *(part for one in uploads for part in ("--config", one.config))]
    command += [part for override in overrides for part in ("--set", override)]
    print(f"sending {shown(upload)}; {len(archive) / 2**20:.1f} MiB in all", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "aft_ray.zip"
        packed.write_bytes(archive)
        runs = RUNS.join(config.run.dir for config in configs)
        metadata = {"step": step, "run": runs, "by": f"{getpass.getuser()}@{socket.gethostname()}"}
        job = server.submit(shlex.join(command), packed, metadata, {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WITHIN_S)})
    print(f"submitted {job}: {shlex.join(command)}\n{how_to(server, job)}", flush=True)
    return follow(server, job) if wait else 0


def shown(upload: Upload) -> str:
    """Return what is sent, by folder: `aft_ray/ (183 files, 0.9 MiB), run.yaml (0.1 MiB)`."""
    num_files: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for name, content in upload.files.items():
        top, separator, _ = name.partition("/")
        num_files[top + separator] += 1
        num_bytes[top + separator] += len(content) if isinstance(content, bytes) else content.stat().st_size
    parts = []
    for name in sorted(num_files, key=lambda name: (not name.endswith("/"), name)):
        count = f"{num_files[name]} files, " if name.endswith("/") else ""
        parts.append(f"{name} ({count}{num_bytes[name] / 2**20:.1f} MiB)")
    return ", ".join(parts)


def check_place(config: Config) -> None:
    """Refuse a relative run folder: a job works in a copy of this folder, which is deleted when the job ends."""
    if "://" not in config.run.dir and not Path(config.run.dir).expanduser().is_absolute():
        raise ConfigError(
            f"submit: run.dir {config.run.dir} is relative, and a job runs in a temporary copy of this folder. "
            "Give an absolute path that every node sees, or a URL, such as --set run.dir=/mnt/shared/quickstart"
        )
    Folder.at(config.run.dir)


def _entry(step: str) -> list[str]:
    """Return the command of a step: its script in jobs/, else the package's own."""
    script = Path("jobs", f"{step}.py")
    if script.is_file():
        return ["python", str(script)]
    if step in {*LINE, WHOLE_LINE}:
        return ["python", "-m", "aft_ray", "job", step]
    known = sorted({*LINE, WHOLE_LINE, *(path.stem for path in Path("jobs").glob("*.py"))})
    raise ConfigError(f"submit {step}: no such job; the jobs are {', '.join(known)}")
