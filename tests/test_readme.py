"""The README is executed: every command in it runs here (at tiny size) or is one of CI's, and its tree is true."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


RUN_ELSEWHERE = {
    "make demo": "test_whole_line.py, with few prompts",
    "make test": "this very run",
    ".venv/bin/aft-ray serve": "test_serve_and_ask.py",
    ".venv/bin/aft-ray ask": "test_serve_and_ask.py",
    ".venv/bin/aft-ray export": "test_export.py",
    ".venv/bin/aft-ray submit": "test_submit.py",
    ".venv/bin/aft-ray preview": "test_command_line.py",
    ".venv/bin/aft-ray run --config configs/quickstart.yaml --retry-failed": "test_command_line.py",
    ".venv/bin/python jobs/": "below, in order",
}


def scripted(tokenizer: str) -> list[str]:
    """Flags that put a scripted model and three prompts into any configuration."""
    settings = [f"engine={{type: scripted, tokenizer: {tokenizer}}}", "prompts.limit=3", "prompts.held_out=1"]
    return [part for setting in settings for part in ("--set", setting)]


def test_the_readme_has_commands() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]
    assert len(COMMANDS) > 8


@pytest.mark.soak
@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(tuple(RUN_ELSEWHERE))])
def test_a_command_of_the_readme_runs(command: str, tmp_path: Path, chatml_tokenizer: str) -> None:
    (tmp_path / "my_prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Name {n} birds."}) + "\n" for n in range(3))
    )
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    arguments = shlex.split(command.replace(".venv/bin/", f"{BIN}/"))
    arguments += ["--until", "selection"] if "run" in arguments else []
    arguments += scripted(chatml_tokenizer) if "run" in arguments else []
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.soak
def test_the_scripts_of_the_readme_run_one_after_the_other(tmp_path: Path, chatml_tokenizer: str) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    scripts = [shlex.split(command)[1:] for command in COMMANDS if command.startswith(".venv/bin/python jobs/")]
    assert [Path(script[0]).stem for script in scripts] == ["prompts", "proposals"]
    for script, *arguments in scripts:
        command = [sys.executable, str(ROOT / script), *arguments, *scripted(chatml_tokenizer)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "quickstart" / "proposals" / "shard-00000.parquet").is_file()


@pytest.mark.parametrize("target", ["demo", "test", "soak", "test-all", "serve", "bench", "check", "setup"])
def test_a_make_target_of_the_readme_exists(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_tree_names_what_is_there_and_nothing_else() -> None:
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    inside, outside = set(), set()
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        (inside if line.startswith("  ") else outside).add(name)
    for name in outside:
        assert (ROOT / name).exists(), name
    for name in inside:
        assert (ROOT / "aft_ray" / name).exists(), name
    package = ROOT / "aft_ray"
    there = {f"{p.name}/" if p.is_dir() else p.name for p in package.iterdir() if not p.name.startswith("__")}
    assert there <= inside, there - inside
