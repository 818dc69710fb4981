"""The API on a real socket without Serve: uvicorn in a thread, for what needs HTTP and a browser but no cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from aft_ray.serving.app import free_port
from aft_ray.serving.http.api import make_api
from aft_ray.serving.service import Service


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serve while the context lasts, and return the base URL."""
    port = free_port("127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(make_api(service), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=30)
