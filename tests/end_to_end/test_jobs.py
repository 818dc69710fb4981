"""Following, listing and stopping jobs on a real head, over connections that break."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from aft_ray.pipeline.following import follow
from aft_ray.pipeline.job_server import JobServer
from tests.command_line import ROOT, aft_ray
from tests.ray_head import RESET, Head, broken_proxy, submit

pytestmark = pytest.mark.soak

COUNTING = """
import itertools, pathlib, sys, time
for number in itertools.count():
    print("line", number, flush=True)
    if pathlib.Path({stop!r}).exists():
        sys.exit(3)
    time.sleep(0.25)
"""
"""A job that counts until a file appears."""
LONG_LINE = "print('begin'); print('x' * 5_000_000); print('end')"
WAITING = "import time; print('waiting', flush=True); time.sleep(600)"


@pytest.fixture
def server(head: Head, monkeypatch: pytest.MonkeyPatch) -> JobServer:
    """The head's own job server, with the head's token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    return JobServer.at(head.url)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as packed:
        packed.writestr("README", "nothing that a job needs")
    return tmp_path / "empty.zip"


def start(server: JobServer, archive: Path, code: str) -> str:
    return server.submit(shlex.join([sys.executable, "-c", code]), archive, {"step": "test"}, {})


@pytest.mark.parametrize("away_s", [0, 1.5], ids=["", "the-server-is-away"])
def test_a_broken_log_stream_is_opened_again_until_the_job_has_ended(
    server: JobServer, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], away_s: float
) -> None:
    stop = tmp_path / "stop"
    job = start(server, archive, COUNTING.format(stop=str(stop)))
    capsys.readouterr()
    with broken_proxy(server.address, [1000, RESET, 1009, 1001], away_s=away_s) as proxy:
        ending = threading.Thread(target=lambda: proxy.unbroken.wait(120) and stop.touch())
        ending.start()
        assert follow(JobServer.at(proxy.url), job) == 3
        ending.join()
        assert proxy.num_streams >= 4
    shown = capsys.readouterr()
    assert shown.out == server.log(job)
    numbers = re.findall(r"^line (\d+)$", shown.out, re.MULTILINE)
    assert numbers == [str(number) for number in range(len(numbers))]
    assert "Traceback" not in shown.err
    if away_s:
        assert "The job may go on; waiting for the server" in shown.err and "answers again" in shown.err


def test_a_line_that_no_stream_can_carry_is_printed(
    server: JobServer, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = start(server, archive, LONG_LINE)
    assert follow(server, job) == 0
    out = capsys.readouterr().out
    assert out.count("x" * 5_000_000) == 1
    assert out.endswith("\nend\n")


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(
    head: Head, server: JobServer, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = start(server, archive, WAITING)
    command = [sys.executable, "-m", "aft_ray", "logs", job, "--follow", "--address"]
    with broken_proxy(head.url, []) as proxy:
        following = subprocess.Popen(
            [*command, proxy.url], env={**head.environment, "PYTHONPATH": str(ROOT)}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert proxy.seen.wait(60)
        time.sleep(0.5)
        following.send_signal(signal.SIGINT)
        _, said = following.communicate(timeout=60)
    assert following.returncode == 130
    assert f"job {job} continues. To follow it: aft-ray logs {job} --address {proxy.url} --follow. To stop it:" in said
    assert "Traceback" not in said
    assert server.job(job).status == "RUNNING"

    stopped = aft_ray("stop", job, "--address", head.url)
    assert (stopped.returncode, "STOPPED" in stopped.stdout) == (0, True), stopped.stdout + stopped.stderr
    assert follow(server, job) == 130
    assert "was stopped on request (aft-ray stop, ray job stop or the dashboard)" in capsys.readouterr().err
    assert "had ended already: STOPPED" in aft_ray("stop", job, "--address", head.url).stdout


def test_a_token_that_is_missing_or_wrong_is_one_sentence(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    missing = aft_ray("jobs", "--address", head.url)
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "requires a token, and there is none in RAY_AUTH_TOKEN" in missing.stderr
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not-the-heads")
    wrong = aft_ray("jobs", "--address", head.url)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "does not accept the token" in wrong.stderr


def test_a_token_file_in_the_home_is_enough(head: Head, archive: Path, tmp_path: Path) -> None:
    """Such a file turns on the authentication of a head that is started there; the client follows the server."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(head.token)
    environment = {name: value for name, value in head.environment.items() if not name.startswith("RAY_")}
    code = f"""
from pathlib import Path
from aft_ray.pipeline.following import follow
from aft_ray.pipeline.job_server import JobServer
server = JobServer.at({head.url!r})
raise SystemExit(follow(server, server.submit("echo hello && exit 4", Path({str(archive)!r}), {{}}, {{}})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "hello" in done.stdout


def test_a_job_that_is_stopped_says_so_and_continues_when_it_is_submitted_again(
    head: Head, server: JobServer, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ["--set", "engine={type: scripted, seconds_per_token: 0.4}", "--set", "prompts.rows_per_shard=1"]
    slow += ["--set", "proposals.placement={max_shards_in_flight: 1, max_actors: 1}"]
    run = project.parent / "run"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sent = submit(head, project, "pipeline", "--no-wait", *slow)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    [job] = re.findall(r"^submitted (\w+)", sent.stdout, re.MULTILINE)
    assert re.search(r"^sending aft_ray/ \(\d+ files, .* MiB in all$", sent.stdout, re.MULTILINE)
    end = time.monotonic() + 120
    while not list((run / "proposals").glob("*.parquet")):
        assert time.monotonic() < end, server.log(job)
        time.sleep(0.2)
    going = aft_ray("status", job, "--address", head.url)
    assert re.search(r"^proposals +running +\d of 4 rows", going.stdout, re.MULTILINE), going.stdout
    assert f"{job}: RUNNING" in going.stdout and "submitted by " in going.stdout
    listed = aft_ray("jobs", "--address", head.url).stdout
    assert re.search(rf"{job} .*RUNNING .*pipeline .*{re.escape(str(run))}", listed), listed

    assert aft_ray("stop", job, "--address", head.url).returncode == 0
    log = server.log(job)
    assert "stopped on request (aft-ray stop, ray job stop or the dashboard)" in log
    assert "SystemExit" not in log and "Traceback" not in log
    halted = aft_ray("status", str(run))
    assert re.search(r"^proposals +stopped +[1-3] of 4 rows", halted.stdout, re.MULTILINE), halted.stdout
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["error"] == "StopRequested"

    again = submit(head, project, "targets", "--set", "engine={type: scripted}", "--set", "prompts.rows_per_shard=1")
    assert again.returncode == 2, "the steps before it are not finished"
    assert "Run it first" in again.stdout
    again = submit(head, project, "proposals", *slow)
    assert again.returncode == 0, again.stdout + again.stderr
    manifest = json.loads((run / "proposals" / "manifest.json").read_text())
    assert (manifest["status"], manifest["rows_out"]) == ("done", 4)


def test_several_runs_of_one_job_go_on_where_they_were_when_the_head_is_killed_and_started_again(
    head: Head, server: JobServer, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = project.parent / "first", project.parent / "run"
    (project / "first.yaml").write_text(yaml.safe_dump({"base": "run.yaml", "run": {"dir": str(first)}}))
    slow = ["--set", "engine={type: scripted, seconds_per_token: 0.1}", "--set", "prompts.rows_per_shard=1"]
    slow += ["--set", "proposals.placement={max_shards_in_flight: 1}"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    wrong = submit(head, project, "proposals", "--config", "first.yaml", "--no-wait")
    assert wrong.returncode == 2 and "several configs are several runs of the whole line" in wrong.stderr

    def sweep(*flags: str) -> tuple[str, str]:
        sent = submit(head, project, "pipeline", "--config", "first.yaml", *flags, *slow)
        [job] = re.findall(r"^submitted (\w+)", sent.stdout, re.MULTILINE)
        return job, sent.stdout + sent.stderr

    job, _ = sweep("--no-wait")
    end = time.monotonic() + 120
    while len(list((second / "proposals").glob("*.parquet"))) < 2:
        assert time.monotonic() < end, server.log(job)
        time.sleep(0.1)
    head.kill()
    before = {file: file.stat().st_mtime_ns for run in (first, second) for file in run.rglob("*.parquet")}
    head.start()
    assert job not in aft_ray("jobs", "--address", head.url).stdout, "the new head knows nothing of it"
    again, said = sweep()
    assert {file: file.stat().st_mtime_ns for file in before} == before
    for run in (first, second):  # they end at the training set, for which this model has no tokenizer
        manifest = json.loads((run / "targets" / "manifest.json").read_text())
        assert (manifest["status"], manifest["rows_out"]) == ("done", 4), said
        events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
        assert events.count("resumed") == 1, events
    told = aft_ray("status", again, "--address", head.url).stdout
    assert f"run {first}" in told and f"run {second}" in told


def test_rays_own_command_works_equally(head: Head, project: Path) -> None:
    shutil.copytree(ROOT / "aft_ray", project / "aft_ray", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "jobs", project / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    for secret in (".env", "secrets", "server.pem", "keys.yaml", "venv"):
        path = project / secret
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/prompts.py", "--config", "run.yaml"]
    done = subprocess.run(
        command, env=head.environment, cwd=project, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((project.parent / "run" / "prompts" / "manifest.json").read_text())
    assert (manifest["status"], manifest["rows_out"]) == ("done", 4)


def test_the_doctor_looks_at_every_node_by_a_job(head: Head, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
    command = [sys.executable, "-m", "aft_ray", "doctor", "--config", "run.yaml", "--address", head.url]
    environment = {**head.environment, "PYTHONPATH": str(ROOT)}

    def doctor(*settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *settings], env=environment, cwd=project, capture_output=True, text=True, check=False,
            timeout=240,
        )  # fmt: skip

    well = doctor()
    assert well.returncode == 0, well.stdout + well.stderr
    assert "it requires a token, and accepts the one on this machine" in well.stdout
    assert re.search(r"^ok +node .*: 4 CPU$", well.stdout, re.MULTILINE)
    ill = doctor("--set", "run.environment=[]", "--set", "targets.placement.num_cpus=64")
    assert ill.returncode == 2
    assert "targets.placement requests 64 CPU per worker, and no node has that" in ill.stdout


def test_logs_as_json_say_which_run_stage_and_prompt_they_speak_of(head: Head, project: Path) -> None:
    failing = ["--set", "engine={type: scripted, fail_requests: true}", "--set", "run.log_format=json"]
    done = submit(head, project, "pipeline", *failing)
    assert done.returncode == 3, done.stdout + done.stderr
    lines = [line for log in head.folder.glob("ray/session_*/logs/worker-*.err") for line in log.open(errors="replace")]
    said = [json.loads(line) for line in lines if line.startswith("{") and "failed: EngineError" in line]
    assert said, "a line per failed row"
    assert {(line["run"], line["stage"]) for line in said} == {("run", "proposals")}
    assert len({line["prompt_id"] for line in said}) == 4
    assert all(line["levelname"] == "WARNING" and line["worker_id"] and line["node_id"] for line in said)
