"""An S3 server on this machine, for what must work on object storage. It comes from the package moto."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest import mock

import pytest

BUCKET = "runs"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 with one empty bucket in a process of its own, and point this process and its children at it.

    Yields the URL of the bucket. Objects live as long as the server does.
    """
    pytest.importorskip("moto", reason="make storage installs the S3 server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "no secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, settings):
            _wait_until_it_answers(port)
            _create_bucket()
            yield f"s3://{BUCKET}"
    finally:
        server.kill()
        server.wait()


def _wait_until_it_answers(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the S3 server did not start")


def _create_bucket() -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
