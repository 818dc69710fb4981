"""A real head node with token authentication and a job server, and a proxy in front of it that breaks connections.

def test_a_job(head: Head) -> None:                        # the fixture is in conftest.py
    with broken_proxy(head.url, endings=[1000, RESET]) as proxy:
        follow(JobServer.at(proxy.url), job)               # its first two log streams end like that
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web

from tests.command_line import ROOT

BIN = Path(sys.executable).parent
TOKEN = "planted-55aa0d10-token-of-the-environment"
"""In the environment of the head, as that of a hub would be."""
KEY = "planted-9f3b2c71-key-of-the-teacher"
"""In a file that the head has."""


@dataclass
class Head:
    """A running head node."""

    environment: dict[str, str]
    """The environment of a person who submits to it. It holds none of the secrets."""
    folder: Path
    """Ray's own files: logs, packages, working folders of jobs."""
    secrets_file: Path
    command: list[str]
    """What starts it, always at the same address."""
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the head node, and wait until its job server answers."""
        log = self.folder / "head.log"
        with log.open("a") as output:
            environment = {**self.environment, "HF_TOKEN": TOKEN, "RAY_metrics_report_interval_ms": "1000"}
            self._process = subprocess.Popen(
                self.command, env=environment, stdout=output, stderr=output, cwd=self.folder
            )
        end, asking = time.monotonic() + 180, ["ray", "job", "list"]
        while subprocess.run(asking, env=self.environment, capture_output=True, check=False).returncode:
            assert self._process.poll() is None and time.monotonic() < end, log.read_text()

    def kill(self) -> None:
        """Kill the head node with all of its processes at once: the jobs' drivers and workers, and what it knew."""
        assert self._process is not None
        for member in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait(60)

    @property
    def url(self) -> str:
        return self.environment["RAY_API_SERVER_ADDRESS"]

    @property
    def token(self) -> str:
        return self.environment["RAY_AUTH_TOKEN"]

    def get(self, path: str) -> str:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def ray_head() -> Iterator[Head]:
    """Start a head node, and end it with all of its processes."""
    folder = Path(tempfile.mkdtemp(prefix="aft", dir="/tmp"))  # Ray's sockets bear no longer path
    port, dashboard = free_port(), free_port()
    secrets_file = folder / "mounted.env"
    secrets_file.write_text(f"# the key of the teacher\nexport TEACHER_KEY='{KEY}'\n")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONUNBUFFERED": "1",
    }
    start = ["ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4"]
    start += [f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats", "--include-dashboard=true"]
    start += [f"--temp-dir={folder / 'ray'}"]
    head = Head(environment, folder, secrets_file, start)
    try:
        head.start()
        yield head
    finally:
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)


def submit(head: Head, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `aft-ray submit ... --config run.yaml` in a folder."""
    command = ["aft-ray", "submit", *arguments, "--config", "run.yaml"]
    environment = {**head.environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )


RESET = None
"""The ending of a connection that is reset."""


@dataclass
class Proxy:
    """A proxy in front of a job server. It takes HTTP and log streams as they are, until it is told otherwise."""

    server: str
    endings: list[int | None]
    """How the next log streams end after their next message: with a close code, or RESET."""
    away_s: float = 0.0
    """For so long after each such ending the proxy resets whatever comes."""
    port: int = 0
    num_streams: int = 0
    seen: threading.Event = field(default_factory=threading.Event)
    """Set once a message of a log has passed."""
    unbroken: threading.Event = field(default_factory=threading.Event)
    """Set with the last ending: later streams end with their source."""
    _back_at: float = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if time.monotonic() < self._back_at:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        headers = {name: value for name, value in request.headers.items() if name == "Authorization"}
        async with aiohttp.ClientSession(headers=headers, auto_decompress=False) as session:
            if request.path.endswith("/logs/tail"):
                return await self._stream(request, session)
            url = f"{self.server}{request.path_qs}"
            async with session.request(request.method, url, data=await request.read()) as answer:
                kind = answer.headers.get("Content-Type", "text/plain")
                return web.Response(status=answer.status, body=await answer.read(), headers={"Content-Type": kind})

    async def _stream(self, request: web.Request, session: aiohttp.ClientSession) -> web.StreamResponse:
        self.num_streams += 1
        stream = web.WebSocketResponse()
        closing = aiohttp.ClientWSTimeout(ws_close=1)
        async with session.ws_connect(f"{self.server}{request.path_qs}", max_msg_size=0, timeout=closing) as source:
            await stream.prepare(request)
            async for message in source:
                await stream.send_str(message.data)
                self.seen.set()
                if self.endings:
                    self._back_at = time.monotonic() + self.away_s
                    ending = self.endings.pop(0)
                    if not self.endings:
                        self.unbroken.set()
                    if ending is not RESET:
                        await stream.close(code=ending)
                        return stream
                    assert request.transport is not None
                    request.transport.abort()
                    return stream
        await stream.close()
        return stream


@contextlib.contextmanager
def broken_proxy(server: str, endings: Sequence[int | None], away_s: float = 0.0) -> Iterator[Proxy]:
    """Start a proxy in front of a job server, in a thread."""
    proxy = Proxy(server, list(endings), away_s)
    loop, started = asyncio.new_event_loop(), threading.Event()
    runner: Any = None

    async def start() -> None:
        nonlocal runner
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", proxy.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.port = runner.addresses[0][1]
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
