"""`aft-ray submit` on a real head with token authentication: exit codes, what travels, where secrets never appear."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_head import KEY, TOKEN, Head, submit
from tests.scripted_endpoint import scripted_endpoint

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def teacher() -> Iterator[str]:
    """The URL of a remote teacher that answers whoever has the key, and repeats it to nobody."""
    with scripted_endpoint() as server:
        server.key, server.words = f"Bearer {KEY}", ("- tea",)
        yield server.url


def test_a_job_works_outside_of_a_checkout_and_ends_with_its_own_exit_code(head: Head, project: Path) -> None:
    done = submit(head, project, "pipeline", "--set", "engine={type: scripted, fail_requests: true}")
    assert done.returncode == 3, done.stdout + done.stderr
    refused = submit(head, project, "prompts", "--resume", "never")
    assert refused.returncode == 4, refused.stdout + refused.stderr
    assert "--resume is never" in refused.stdout
    missing = submit(head, project, "prompts", "--set", "run.environment=[NOT_THERE]")
    assert missing.returncode == 2, missing.stdout + missing.stderr
    assert "environment variables are missing: NOT_THERE on " in missing.stdout
    manifest = json.loads((project.parent / "run" / "prompts" / "manifest.json").read_text())
    assert manifest["commit"], "the commit of the checkout that it was submitted from"


def test_secrets_reach_the_workers_and_nothing_that_is_kept(head: Head, project: Path, teacher: str) -> None:
    settings = [
        f"targets.engine={{type: openai, base_url: {teacher}, model: t, api_key_env: TEACHER_KEY}}",
        "run.environment=[HF_TOKEN]",
        f"run.environment_file={head.secrets_file}",
    ]
    done = submit(head, project, "pipeline", *(part for setting in settings for part in ("--set", setting)))
    manifest = json.loads((project.parent / "run" / "targets" / "manifest.json").read_text())
    assert (manifest["status"], manifest["rows_out"]) == ("done", 4), done.stdout + done.stderr  # it needs the key
    said = {"stdout": done.stdout, "stderr": done.stderr}
    for path in ("/api/jobs/", "/api/v0/tasks?detail=1", "/api/v0/actors?detail=1", "/api/v0/workers?detail=1",
                 "/api/v0/runtime_envs?detail=1", "/api/v0/cluster_events", "/api/cluster_status", "/events",
                 "/api/serve/applications/", "/nodes?view=summary"):  # fmt: skip
        with contextlib.suppress(urllib.error.HTTPError):
            said[path] = head.get(path)
    assert "TEACHER_KEY" in said["/api/jobs/"], "the setting is there, by its name"
    job = re.findall(r"^submitted (\w+)", done.stdout, re.MULTILINE)[0]
    said["the job's log"] = head.get(f"/api/jobs/{job}/logs")
    said |= metrics_of(head)
    assert any("ray_aft_rows_total{" in text and 'stage="targets"' in text for text in said.values())
    for place, text in said.items():
        assert KEY not in text and TOKEN not in text, place
    packages = list(head.folder.rglob("_ray_pkg_*"))
    assert packages and not [file for folder in packages for file in folder.rglob(".env")], "the unpacked upload"
    kept = [file for folder in (head.folder, project.parent / "run") for file in folder.rglob("*") if file.is_file()]
    assert any("runtime_resources" in str(file) for file in kept) and any(file.name == "events.jsonl" for file in kept)
    for file in kept:
        content = file.read_bytes()
        if file != head.secrets_file:
            assert KEY.encode() not in content and TOKEN.encode() not in content, file


def metrics_of(head: Head) -> dict[str, str]:
    """Return what each of Ray's exporters tells Prometheus, once the rows of the last run are among it."""
    listed = json.loads((head.folder / "ray" / "prom_metrics_service_discovery.json").read_text())
    end = time.monotonic() + 60
    while True:
        texts = {}
        for target in listed[0]["targets"]:
            with contextlib.suppress(urllib.error.URLError):  # the autoscaler's is listed where there is none, too
                texts[target] = urllib.request.urlopen(f"http://{target}/metrics", timeout=30).read().decode()
        if any('stage="targets"' in text for text in texts.values()) or time.monotonic() > end:
            return texts
        time.sleep(0.5)


def test_a_missing_file_of_variables_is_named(head: Head, project: Path, teacher: str) -> None:
    engine = f"targets.engine={{type: openai, base_url: {teacher}, model: t, api_key_env: TEACHER_KEY}}"
    done = submit(head, project, "pipeline", "--set", engine)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "environment variables are missing: TEACHER_KEY on " in done.stdout
    assert "run.environment_file" in done.stdout
    assert not list((project.parent / "run" / "proposals").glob("*.parquet")), "before the first token"
