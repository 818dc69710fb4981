"""Servers of S3 and of Google's storage on this machine, for what must work on object storage.

They come from the packages moto and gcp-storage-emulator.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.ray_head import free_port

BUCKET = "runs"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 with one empty bucket in a process of its own, and point this process and its children at it.

    Yields the URL of the bucket. Objects live as long as the server does.
    """
    pytest.importorskip("moto", reason="make storage installs the S3 server")
    port = free_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "no secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with serving("moto.server", "-H", "127.0.0.1", "-p", str(port), port=port), mock.patch.dict(os.environ, settings):
        _create_bucket()
        yield f"s3://{BUCKET}"


@contextlib.contextmanager
def google_server(folder: Path) -> Iterator[str]:
    """Serve Google's storage with one empty bucket, as `s3_server` serves S3.

    The key of a service account that is written into `folder` is enough: Google's client signs its tokens itself.
    """
    pytest.importorskip("gcp_storage_emulator", reason="make storage installs the server of Google's storage")
    port = free_port()
    settings = {
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{port}",
        "GOOGLE_APPLICATION_CREDENTIALS": str(_service_account(folder)),
    }
    command = ["gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory"]
    with serving(*command, "--default-bucket", BUCKET, port=port), mock.patch.dict(os.environ, settings):
        yield f"gs://{BUCKET}"


@contextlib.contextmanager
def serving(*command: str, port: int) -> Iterator[None]:
    """Run a Python module that serves a port, in a process of its own."""
    server = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(port)
        yield
    finally:
        server.kill()
        server.wait()


def _wait_until_it_answers(port: int) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the storage server did not start")


def _create_bucket() -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)


def _service_account(folder: Path) -> Path:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": "tests",
        "private_key_id": "tests",
        "private_key": key.decode(),
        "client_email": "tests@tests.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "http://127.0.0.1:9/token",
    }
    file = folder / "account.json"
    file.write_text(json.dumps(account))
    return file
