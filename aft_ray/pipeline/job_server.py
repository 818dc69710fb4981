"""The job server of a Ray cluster, through its REST API: jobs, their states, their logs.

    server = JobServer.at("http://127.0.0.1:8265")
    server.job("raysubmit_4qTr").status                     # "RUNNING"
    async for text in server.log_stream("raysubmit_4qTr"): ...

Where a cluster has token authentication, the token is taken from where Ray itself takes it: `RAY_AUTH_TOKEN`, the file
`RAY_AUTH_TOKEN_PATH`, or `~/.ray/auth_token`. It is sent only to a server that asks for one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.errors import ClusterError, ConfigError, EngineError

if TYPE_CHECKING:
    import requests

TIMEOUT_S = 30.0
HEARTBEAT_S = 20.0
"""A log stream whose other end does not answer a ping for so long is taken for broken."""
CLOSE_WITHIN_S = 1.0
TOKEN_FILE = "~/.ray/auth_token"
WHERE_TOKENS_ARE = f"RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or {TOKEN_FILE}"
RUNS = "\n"
"""Between the run folders of a job, in its metadata."""
FINAL = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


class UnknownJob(ConfigError):
    """The job server knows no such job."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job server knows of a job."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    entrypoint: str
    message: str
    exit_code: int | None
    """Of the job's own process. None while it runs, and for a job that was stopped or lost."""
    started: float | None
    """Unix time in seconds."""
    ended: float | None
    metadata: Mapping[str, str]

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def runs(self) -> list[str]:
        """The folders of its runs, one after the other; none for a job of another kind."""
        return [run for run in self.metadata.get("run", "").split(RUNS) if run]


@dataclass
class JobServer:
    """A job server that answers."""

    address: str
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, address: str) -> JobServer:
        """Return the server at `http://HOST:PORT`.

        Raises ConfigError, in one sentence, for an address of another form, and for a server that does not answer, is
        not Ray's, or wants a token that is not here.
        """
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", address):
            raise ConfigError(f"--address {address}: expected http://HOST:PORT, such as http://127.0.0.1:8265")
        server = cls(address.rstrip("/"))
        try:
            answer = server._ask("GET", "/api/version")
        except ClusterError as error:
            raise ConfigError(f"{error}. Is the cluster up, and is this --address its dashboard's?") from None
        if "ray_version" not in answer.text:
            raise ConfigError(f"{address} answers, but is not a Ray job server")
        return server

    def ray_version(self) -> str:
        return str(self._ask("GET", "/api/version").json()["ray_version"])

    def wants_token(self) -> bool:
        """Return whether the cluster has token authentication."""
        return bool(self._ask("GET", "/api/authentication_mode").json()["authentication_mode"] == "token")

    def jobs(self) -> list[Job]:
        """Return the jobs that were submitted to the cluster, the newest first."""
        found = [_job(details) for details in self._ask("GET", "/api/jobs/").json() if details.get("submission_id")]
        return sorted(found, key=lambda job: -(job.started or 0))

    def job(self, job: str) -> Job:
        """Return a job. Raises UnknownJob."""
        return _job(self._ask("GET", f"/api/jobs/{job}", job).json())

    def log(self, job: str) -> str:
        """Return all that a job has said so far."""
        return str(self._ask("GET", f"/api/jobs/{job}/logs", job).json()["logs"])

    def stop(self, job: str) -> bool:
        """Ask a job to end. Returns whether it was running."""
        return bool(self._ask("POST", f"/api/jobs/{job}/stop", job).json()["stopped"])

    def submit(self, entrypoint: str, archive: Path, metadata: Mapping[str, str], variables: Mapping[str, str]) -> str:
        """Upload an archive, start a job in it, and return the id of the job."""
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        with _address_in_environment(self.address):
            try:
                return JobSubmissionClient(self.address, headers=dict(self.headers)).submit_job(
                    entrypoint=entrypoint,
                    runtime_env={"working_dir": str(archive), "env_vars": dict(variables)},
                    metadata=dict(metadata),
                )
            except (ConnectionError, RuntimeError, AuthenticationError) as error:
                raise EngineError(f"submit: the job server {self.address} refuses the job: {error}") from None

    async def log_stream(self, job: str) -> AsyncIterator[str]:
        """Yield a job's log from its beginning as it grows.

        The end of the stream says nothing of the job: any connection on the way may have closed it. Raises OSError or
        aiohttp.ClientError.
        """
        import aiohttp

        url = f"{self.address}/api/jobs/{job}/logs/tail"
        closing = aiohttp.ClientWSTimeout(ws_close=CLOSE_WITHIN_S)  # the head does not answer a close
        async with (
            aiohttp.ClientSession(headers=self.headers, trust_env=True) as session,
            session.ws_connect(url, heartbeat=HEARTBEAT_S, max_msg_size=0, timeout=closing) as stream,
        ):
            async for message in stream:
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return
                yield message.data

    def _ask(self, method: str, path: str, job: str = "") -> requests.Response:
        """Return an answer. Raises ConfigError for what the user has to mend, ClusterError for what may pass."""
        import requests

        try:
            answer = requests.request(method, self.address + path, headers=self.headers, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            reason = "nothing listens there" if "refused" in str(error) else type(error).__name__
            raise ClusterError(f"the job server {self.address} does not answer: {reason}") from None
        if answer.status_code == 401 and not self.headers:
            self.headers["Authorization"] = f"Bearer {find_token(self.address)}"
            return self._ask(method, path, job)
        if answer.status_code in (401, 403):
            raise ConfigError(
                f"the job server {self.address} does not accept the token. Ray takes it from {WHERE_TOKENS_ARE}; it "
                "must be the head's"
            )
        if answer.status_code == 404 and job:
            raise UnknownJob(f"the cluster knows no job {job}. `aft-ray jobs` lists those it knows")
        if answer.status_code >= 400:
            first_line = (answer.text.strip().splitlines() or [""])[0][:200]
            raise ClusterError(f"the job server {self.address} answers {answer.status_code} to {path}: {first_line}")
        return answer


def find_token(address: str) -> str:
    """Return the token of this person, from where Ray takes it. Raises ConfigError where there is none."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or TOKEN_FILE).expanduser()
        with contextlib.suppress(OSError):
            token = file.read_text()
    if not token.strip():
        raise ConfigError(f"the job server {address} requires a token, and there is none in {WHERE_TOKENS_ARE}")
    return token.strip()


def _job(details: Mapping[str, Any]) -> Job:
    return Job(
        id=details.get("submission_id") or details.get("job_id") or "",
        status=details["status"],
        entrypoint=details.get("entrypoint") or "",
        message=(details.get("message") or "").strip(),
        exit_code=details.get("driver_exit_code"),
        started=_seconds(details.get("start_time")),
        ended=_seconds(details.get("end_time")),
        metadata=details.get("metadata") or {},
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


@contextlib.contextmanager
def _address_in_environment(address: str) -> Iterator[None]:
    """Set the address for Ray's client, which prefers this variable, and `RAY_ADDRESS`, to its own argument."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
