"""After `let_waiting_threads_sleep`, OpenMP reports that the threads of a new process sleep while they wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from aft_ray.cpu import let_waiting_threads_sleep


@pytest.mark.parametrize(
    "own, expected",
    [({}, 5000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "passive"}, 0)],
    ids=["unset", "own count", "own policy"],
)
def test_threads_sleep_soon_unless_the_user_says_otherwise(
    own: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    let_waiting_threads_sleep()
    told = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env={**os.environ, "OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", told)
    if not counts:
        pytest.skip("torch's OpenMP is not GNU's here")
    assert int(counts[0]) == expected
