"""What a submitted job takes along: what it needs, never a secret, and never more than Ray takes."""

from __future__ import annotations

import io
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from aft_ray.config import load_config
from aft_ray.errors import ConfigError
from aft_ray.pipeline import upload as upload_module
from aft_ray.pipeline.upload import joined, upload_of
from tests.command_line import ROOT

SECRETS = (".env", "secrets/id_rsa", "server.pem", "configs/keys.yaml", "deploy.key", ".aws/credentials")
CLUTTER = (
    "venv/lib/a.py", ".venv312/lib/a.py", "node_modules/a/index.js", "exports/aft/adapter_model.safetensors",
    "data/rows.parquet", "runs/mine/manifest.json",
)  # fmt: skip
RUN = {"run": {"dir": "/shared/run"}, "engine": {"type": "vllm", "model": "m/m"}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody's own, outside of any checkout, with secrets and clutter in it; the working directory."""
    folder = tmp_path / "project"
    for name in (*SECRETS, *CLUTTER, "configs/other.yaml", "jobs/mine.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"planted-secret in {name}")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    monkeypatch.chdir(folder)
    return folder


def sent(config: str, *overrides: str) -> dict[str, bytes]:
    """Return the files of the archive."""
    packed = upload_of(config, load_config(config, overrides)).archive()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_package_the_jobs_and_the_configs_travel_and_nothing_else(project: Path) -> None:
    files = sent("run.yaml")
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "aft_ray").rglob("*.py")}
    assert set(files) - {name for name in files if name.startswith("aft_ray/")} == {
        "run.yaml",
        "configs/other.yaml",
        "jobs/mine.py",
    }
    assert package <= set(files)
    assert "aft_ray/templates/aft.yaml" in files and "aft_ray/data/constraints.jsonl" in files
    assert not any(b"planted-secret" in content for name, content in files.items() if name not in LEGITIMATE)


LEGITIMATE = {"configs/other.yaml", "jobs/mine.py"}


def test_a_checkout_sends_what_git_tracks_but_no_secret_that_git_tracks(project: Path) -> None:
    shutil.copytree(ROOT / "aft_ray", project / "aft_ray", ignore=shutil.ignore_patterns("__pycache__"))
    (project / "notes.md").write_text("tracked")
    (project / "scratch.md").write_text("not tracked")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "notes.md", ".env", "server.pem", "configs/keys.yaml"], check=True)
    files = sent("run.yaml")
    assert files["notes.md"] == b"tracked"
    assert not {"scratch.md", *SECRETS, *CLUTTER} & set(files)


def test_several_configs_travel_together_and_two_of_one_name_from_elsewhere_do_not(project: Path) -> None:
    def elsewhere(folder: str, seed: int) -> str:
        path = project.parent / folder / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({**RUN, "run": {"dir": f"/shared/{folder}", "seed": seed}}))
        return str(path)

    here, there, other = "run.yaml", elsewhere("there", 1), elsewhere("other", 2)
    uploads = {config: upload_of(config, load_config(config)) for config in (here, there, other)}
    assert {"run.yaml", "submitted/mine.yaml"} <= set(joined([uploads[here], uploads[there]]).files)
    with pytest.raises(ConfigError, match=r"two of the configs are called mine\.yaml.*Rename one"):
        joined([uploads[there], uploads[other]])


def test_the_same_files_are_the_same_archive(project: Path) -> None:
    first = upload_of("run.yaml", load_config("run.yaml")).archive()
    (project / "run.yaml").touch()
    assert upload_of("run.yaml", load_config("run.yaml")).archive() == first


def test_the_commit_travels() -> None:
    from aft_ray.runs import commit

    files = upload_of("configs/quickstart.yaml", load_config(ROOT / "configs" / "quickstart.yaml")).files
    assert files["aft_ray/COMMIT"] == (commit() or "unknown").encode()


def test_a_config_takes_along_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = sent("configs/demo.yaml")
    for name in ("demo.yaml", "quickstart.yaml", "miniature/quick.yaml", "miniature/method.yaml"):
        assert f"configs/{name}" in files
    assert "configs/miniature/base/model.safetensors" in files, "the weights of the study's base model"


@pytest.mark.parametrize("module", ["my_checks", "checks.words"])
def test_the_module_of_an_own_verifier_travels(project: Path, module: str) -> None:
    file = project / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text("def right(row, text): return True")
    name = str(file.relative_to(project))
    assert name in sent("run.yaml", f"scores.verifier={module}:right")
    assert name not in sent("run.yaml")


def test_a_config_outside_of_the_folder_is_sent_whole(project: Path) -> None:
    outside = project.parent / "outside"
    outside.mkdir()
    (outside / "base.yaml").write_text(yaml.safe_dump(RUN))
    (outside / "mine.yaml").write_text("base: base.yaml\nproposals: {num_per_prompt: 6}\n")
    upload = upload_of(str(outside / "mine.yaml"), load_config(outside / "mine.yaml"))
    assert upload.config == "submitted/mine.yaml"
    content = upload.files[upload.config]
    assert isinstance(content, bytes)
    assert yaml.safe_load(content) == {**RUN, "proposals": {"num_per_prompt": 6}}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("training.init_adapter=my/second/round", "training.init_adapter my/second/round: no such file or folder here"),
        ("templates.aggregator=mine.yaml", "templates.aggregator mine.yaml: no such file"),
        ("prompts.source=rows.jsonl", "prompts.source rows.jsonl: no such file"),
        ("engine.model=./model", "engine.model ./model: no such file or folder here"),
        ("evaluation.prompts={source: asked.jsonl}", "evaluation.prompts.source asked.jsonl: no such file"),
        ("prompts.source=../outside.jsonl", "lies outside of this folder"),
        ("prompts.source=secrets/rows.jsonl", "has the name of a secret"),
        ("run.environment_file=.env", "run.environment_file .env: secrets never travel"),
        ("serving.keys_file=configs/keys.yaml", "serving.keys_file configs/keys.yaml: secrets never travel"),
    ],
)
def test_what_can_neither_travel_nor_be_there_is_refused(project: Path, setting: str, words: str) -> None:
    (project.parent / "outside.jsonl").write_text("{}")
    (project / "secrets" / "rows.jsonl").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        upload_of("run.yaml", load_config("run.yaml", [setting]))
    assert words in str(refused.value)
    assert "absolute path" in str(refused.value)


@pytest.mark.parametrize(
    "setting",
    [
        "training.init_adapter=/shared/round",
        "prompts.source=s3://bucket/rows.jsonl",
        "engine.model=gs://bucket/model",
        "run.environment_file=/run/secrets/aft_ray.env",
        "prompts.source=hub:owner/name",
        "evaluation.prompts={source: 'hub:owner/name:test#v1'}",
        "serving.adapters={aft: owner/lora#v1}",
        "proposals.adapter=owner/lora",
        "engine.model=smollm2-135m-instruct",
    ],
)
def test_what_lies_elsewhere_is_left_there(project: Path, setting: str) -> None:
    assert sent("run.yaml", setting).keys() == sent("run.yaml").keys()


def test_more_than_ray_takes_is_refused_with_the_largest_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    folder = project / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(random.Random(0).randbytes(3 * 2**20))
    monkeypatch.setattr(upload_module, "LIMIT_MIB", 2)
    changes: Any = ["proposals.adapter=adapter"]
    with pytest.raises(ConfigError, match=r"and Ray takes 2 MiB. The largest: adapter/adapter_model.safetensors \(3.0"):
        upload_of("run.yaml", load_config("run.yaml", changes)).archive()
