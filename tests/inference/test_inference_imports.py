"""Any module of the room can be imported first, and none imports anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("ray", "torch", "transformers", "vllm")


@pytest.mark.parametrize(
    "module",
    [
        "aft_ray.config",
        "aft_ray.templates",
        "aft_ray.inference",
        "aft_ray.inference.propose_aggregate",
    ],
)
def test_a_module_can_be_the_first_import_and_is_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_package_offers_all_it_names() -> None:
    import aft_ray.inference as room

    assert all(getattr(room, name) is not None for name in room.__all__)
