"""The command line in this process: its entry point, without the seconds that an interpreter takes to start."""

from __future__ import annotations

import contextlib
import io
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from aft_ray.cli import main

ROOT = Path(__file__).parent.parent


def aft_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `aft-ray ARGUMENTS` in the repository's root. A Ray that is connected already is used and left alone."""
    command = ["aft-ray", *arguments]
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch("sys.argv", command),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    return subprocess.CompletedProcess(command, ended.value.code or 0, out.getvalue(), err.getvalue())  # type: ignore[arg-type]
