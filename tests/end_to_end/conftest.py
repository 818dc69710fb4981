"""What the tests of jobs submit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.ray_head import KEY, TOKEN


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of somebody who installed the package: a config, prompts, secrets, an environment. No checkout."""
    folder = tmp_path / "project"
    for name in (".env", "secrets/id_rsa", "server.pem", "keys.yaml", "venv/lib/big.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{KEY} {TOKEN}")
    rows = [{"prompt": f"Name river number {number}."} for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "run": {"dir": str(tmp_path / "run")},
        "engine": {"type": "scripted"},
        "prompts": {"source": "prompts.jsonl", "held_out": 0},
        "proposals": {"num_per_prompt": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder
