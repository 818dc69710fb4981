"""The command line: what bad input is answered with, and that nothing starts before it is needed.

Real processes are only those whose start or end is what is tested; all else runs in this one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from aft_ray.run_lock import RunLock
from aft_ray.runs import read_manifest
from aft_ray.storage import Folder
from tests.command_line import ROOT, aft_ray

AFT_RAY = [sys.executable, "-m", "aft_ray"]
GOOD = {"prompt": "Name three rivers."}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run with scripted models over two prompts."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps({"prompt": "Name a bird."}) + "\n")
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run": {"dir": str(tmp_path / "run")},
                "engine": {"type": "scripted"},
                "prompts": {"source": str(tmp_path / "prompts.jsonl"), "held_out": 0},
                "proposals": {"num_per_prompt": 4},
            }
        )
    )
    return path


def test_help_names_every_command() -> None:
    done = subprocess.run([*AFT_RAY, "--help"], capture_output=True, text=True, check=False, cwd=ROOT, timeout=240)
    assert done.returncode == 0
    for command in (
        "run",
        "train",
        "evaluate",
        "report",
        "export",
        "serve",
        "ask",
        "plan",
        "submit",
        "jobs",
        "logs",
        "status",
        "stop",
        "doctor",
    ):
        assert command in done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; import aft_ray.cli; "
        "print([m for m in ('ray', 'torch', 'transformers', 'vllm', 'pydantic', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_module_says_what_it_is_for() -> None:
    for path in [*(ROOT / "aft_ray").rglob("*.py"), *(ROOT / "jobs").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert path.read_text().removeprefix("r").startswith('"""'), path


@pytest.mark.soak
def test_importing_every_module_starts_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = f"""
import importlib, os, pathlib, pkgutil, socket, sys
def refuse(*a, **k): raise AssertionError("network at import")
socket.socket.connect = refuse
sys.path.insert(0, {str(ROOT)!r})
import aft_ray
before = dict(os.environ)
for module in pkgutil.walk_packages(aft_ray.__path__, "aft_ray."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
ours = ("RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL", "VLLM_NO_USAGE_STATS", "TOKENIZERS_PARALLELISM")
assert all(os.environ.get(k) == before.get(k) for k in ours), "environment changed"
assert not list(pathlib.Path(".").iterdir()), "files written"
"""
    subprocess.run([sys.executable, "-B", "-c", code], check=True, cwd=tmp_path, timeout=240)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "ok"}', '{"prompt": '], ["prompts.jsonl:2", "JSON"]),
        (['{"prompt": "ok"}', '{"prompt": "  "}'], ["prompts.jsonl:2", "empty"]),
        (['{"prompt": "ok"}', '{"text": "no prompt"}'], ["prompts.jsonl:2", "instruction"]),
        (['{"prompt_id": "a", "prompt": "x"}', '{"prompt_id": "a", "prompt": "y"}'], ["prompts.jsonl:2", "'a'"]),
    ],
    ids=["unreadable", "empty", "no-prompt", "duplicate-id"],
)
@pytest.mark.parametrize(("on_bad_row", "code"), [("record", 3), ("stop", 2)])
def test_bad_prompts_end_the_run_and_the_line_is_named(
    config: Path, lines: list[str], words: list[str], on_bad_row: str, code: int
) -> None:
    """One of two is more than may fail."""
    (config.parent / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    done = aft_ray("run", "--config", str(config), "--until", "prompts", "--set", f"prompts.on_bad_row={on_bad_row}")
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("proposals.num_per_promt=3", ["num_per_promt", "num_per_prompt"]),
        ("run.seed=many", ["run.seed", "'many'"]),
        ("proposals.engine={type: vllm, model: /no/such/model}", ["/no/such/model", "no such folder"]),
        ("targets.sampling.max_tokens=4090", ["targets.sampling.max_tokens 4090", "max_model_len 4096"]),
        ("templates.aggregator=nowhere.yaml", ["nowhere.yaml"]),
    ],
    ids=["unknown-key", "wrong-type", "missing-model", "no-window", "missing-template"],
)
def test_bad_settings_end_with_2_before_anything_is_written(config: Path, setting: str, words: list[str]) -> None:
    done = aft_ray("run", "--config", str(config), "--set", setting)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (config.parent / "run").exists()


def test_a_run_is_resumed_and_never_written_over(ray_cluster: None, config: Path) -> None:
    arguments = ("run", "--config", str(config), "--until", "selection")
    first = aft_ray(*arguments)
    assert first.returncode == 0, first.stderr
    folder = config.parent / "run" / "proposals"
    made = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}
    assert made
    assert aft_ray(*arguments, "--resume", "must").returncode == 0
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.parquet")} == made
    settings = (config.parent / "run" / "config.resolved.yaml").read_bytes()
    refused = aft_ray(*arguments, "--resume", "never")
    assert refused.returncode == 4
    changed = aft_ray(*arguments, "--set", "proposals.sampling.top_k=7")
    assert changed.returncode == 4
    assert "proposals.sampling.top_k: was 50, is 7" in changed.stderr
    assert (config.parent / "run" / "config.resolved.yaml").read_bytes() == settings, "still what the folder is made of"
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.parquet")} == made


def test_interrupted_it_ends_with_130_and_says_how_to_go_on(config: Path) -> None:
    slow = ["--set", "engine={type: scripted, seconds_per_token: 10}", "--until", "proposals"]
    # what a shell starts in the background ignores SIGINT, and so does all that it starts
    command = ["env", "--default-signal=INT", *AFT_RAY, "run", "--config", str(config), *slow]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("proposals") and "starting" not in line:  # the workers are up
            process.send_signal(signal.SIGINT)
            break
    said += process.stderr.readlines()
    assert process.wait(120) == 130, "".join(said)
    assert "interrupted; the same command continues from here" in "".join(said)


def test_more_failures_than_allowed_end_with_3(ray_cluster: None, config: Path) -> None:
    done = aft_ray("run", "--config", str(config), "--until", "proposals", "--set", "engine.fail_requests=true")
    assert done.returncode == 3, done.stderr
    assert "2 of 2 rows failed (2 EngineError)" in done.stderr


def test_a_folder_with_other_things_in_it_is_refused(config: Path) -> None:
    (config.parent / "run").mkdir()
    (config.parent / "run" / "thesis.txt").write_text("do not touch")
    done = aft_ray("run", "--config", str(config), "--until", "prompts")
    assert done.returncode == 4
    assert "not empty" in done.stderr


def test_a_folder_in_use_is_refused_with_4_and_what_a_failed_write_left_is_removed(
    config: Path, tmp_path: Path
) -> None:
    run = Folder.at(tmp_path / "run")
    run.write_bytes("config.resolved.yaml.1-abc.partial", b"half")
    command = ("run", "--config", str(config), "--until", "prompts")
    with RunLock(run):
        refused = aft_ray(*command)
        assert refused.returncode == 4
        [sentence] = refused.stderr.strip().splitlines()
        assert f"is in use by another command: pid {os.getpid()} on " in sentence
    for _ in range(2):
        done = aft_ray(*command)
        assert done.returncode == 0, done.stderr
        run.child("prompts").write_bytes("shard-00000.parquet.1-abc.partial", b"half")
    assert aft_ray(*command).returncode == 0
    left = [path.name for path in (tmp_path / "run").rglob("*")]
    assert not [name for name in left if name.endswith(".partial") or name.startswith("owner-")]


def test_prompts_that_are_added_to_a_finished_run_are_made_alone(
    ray_cluster: None, config: Path, tmp_path: Path
) -> None:
    command = ("run", "--config", str(config), "--until", "selection")
    assert aft_ray(*command).returncode == 0
    proposals = Folder.at(tmp_path / "run").child("proposals")
    before, manifest = proposals.rows(), read_manifest(proposals)
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Name a tree."}) + "\n")
    done = aft_ray(*command, "--set", "prompts.license=MIT")
    assert done.returncode == 0, done.stderr
    after, grown = proposals.rows(), read_manifest(proposals)
    assert after[: len(before)] == before and len(after) == len(before) + 1
    assert manifest is not None and grown is not None
    new_tokens = sum(proposal["num_tokens"] for proposal in after[-1]["proposals"])
    assert grown.completion_tokens - manifest.completion_tokens == new_tokens
    assert len(Folder.at(tmp_path / "run").child("selection").rows()) == len(after)


def test_asking_where_nothing_serves_says_so() -> None:
    done = aft_ray("ask", "Hello?", "--base-url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "nothing answers at http://127.0.0.1:9" in done.stderr


def test_submitting_with_a_relative_run_folder_is_refused() -> None:
    done = aft_ray("submit", "pipeline", "--config", "configs/quickstart.yaml")
    assert done.returncode == 2
    assert "run.dir runs/quickstart is relative" in done.stderr


def test_plan_prints_the_resolved_settings() -> None:
    done = aft_ray("plan", "--config", "configs/llama_8b_gpu.yaml")
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["selection"]["num_proposals"] == 5


def test_a_preview_shows_what_is_trained_on_and_lets_plan_estimate_the_run(
    ray_cluster: None, config: Path, chatml_tokenizer: str
) -> None:
    engine = f"engine={{type: scripted, tokenizer: {chatml_tokenizer}, num_tokens: 5}}"
    settings = ["--config", str(config), "--set", engine, "--set", "targets.engine={type: scripted, num_tokens: 3}"]
    before = aft_ray("plan", *settings)
    assert "no sample of these settings yet" in before.stdout
    shown = aft_ray("preview", "-n", "2", *settings)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("proposal 1 (scripted") == 2
    assert shown.stdout.count("«word-") == 4, "two prompts, two variants, trained tokens marked"
    assert "<|im_end|>»" in shown.stdout
    card = next((config.parent / "run.preview").rglob("card.md")).read_text()
    assert "| aft | train | 2 |" in card
    after = aft_ray("plan", *settings)
    assert "scaled from a sample of 2" in after.stdout
    row = next(line for line in after.stdout.splitlines() if "proposals" in line and "│" in line)
    assert [cell.strip() for cell in row.split("│")][2:5:2] == ["2", "40"], "two prompts, four samples of five tokens"
    assert not (config.parent / "run").exists(), "nothing of the run itself is started"


def test_rows_that_failed_are_retried_by_command_only_and_go_through_once_the_cause_is_mended(
    ray_cluster: None, config: Path
) -> None:
    failing = ["--config", str(config), "--until", "selection", "--set", "scores.scorer=none"]
    first = aft_ray("run", *failing, "--set", "engine={type: scripted, fail_requests: true}")
    assert first.returncode == 3
    assert "--retry-failed" in first.stderr
    again = aft_ray("run", *failing, "--set", "engine={type: scripted, fail_requests: true}", "--retry-failed")
    assert again.returncode == 3, "tried again, and they failed again"
    failed = (config.parent / "run" / "proposals" / "failed" / "shard-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"] for line in failed] == ["EngineError"] * 2
    mended = aft_ray("run", *failing, "--retry-failed")
    assert mended.returncode == 0, mended.stderr
    assert not list((config.parent / "run" / "proposals" / "failed").glob("*"))
    assert json.loads((config.parent / "run" / "selection" / "manifest.json").read_text())["rows_out"] == 2


def test_a_run_under_way_has_a_report_so_far(config: Path) -> None:
    run = config.parent / "run"
    assert aft_ray("run", "--config", str(config), "--until", "prompts").returncode == 0
    with RunLock(Folder.at(run)):
        done = aft_ray("report", str(run))
    assert done.returncode == 0, done.stderr
    assert f"its report so far: {run}/report/report.html, without: model/sft; " in done.stdout
    assert (
        "not in this report, since it is not finished: evaluation/base/scores"
        in (run / "report" / "report.html").read_text()
    )
    moved = run.rename(config.parent / "moved")
    done = aft_ray("report", str(moved))
    assert (done.returncode, run.exists()) == (2, False), "its own folder, wherever that is now"
    assert f"the report {moved}/report/report.html is written, without: " in done.stderr


def test_a_report_needs_a_run(tmp_path: Path) -> None:
    done = aft_ray("report", str(tmp_path))
    assert (done.returncode, "holds no run" in done.stderr) == (2, True)


def second(config: Path, name: str, **sections: dict[str, object]) -> Path:
    """Write a config beside another one, with a folder of its own."""
    own = {**sections, "base": config.name, "run": {"dir": str(config.parent / name), **sections.get("run", {})}}
    (config.parent / f"{name}.yaml").write_text(yaml.safe_dump(own))
    return config.parent / f"{name}.yaml"


def test_several_configs_are_several_runs_and_one_that_fails_keeps_no_other_from_starting(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = second(config, "failing", run={"environment": ["NOT_THERE_YET"]})
    other = second(config, "other", prompts={"limit": 1})
    configs = [part for path in (config, failing, other) for part in ("--config", str(path))]
    done = aft_ray("run", *configs, "--until", "prompts")
    assert done.returncode == 2, "that of the run that failed"
    folder = config.parent
    assert done.stdout == f"{folder}/run: done\n{folder}/failing: failed: ConfigError\n{folder}/other: done\n"
    assert "environment variables are missing: NOT_THERE_YET" in done.stderr
    monkeypatch.setenv("NOT_THERE_YET", "now")
    again = aft_ray("run", *configs, "--until", "prompts")
    assert (again.returncode, again.stdout.count(": done")) == (0, 3), again.stderr


def test_two_runs_never_share_a_folder(config: Path) -> None:
    (config.parent / "same.yaml").write_text(f"base: {config.name}\nproposals: {{num_per_prompt: 6}}\n")
    configs = ["--config", str(config), "--config", str(config.parent / "same.yaml")]
    done = aft_ray("run", *configs, "--until", "prompts")
    assert done.returncode == 2
    assert "each run needs a folder of its own" in done.stderr
    assert not (config.parent / "run").exists()
