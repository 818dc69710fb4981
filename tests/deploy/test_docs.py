"""docs/deploy.md: every command in it is checked by the command line, the file or the schema that it is for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from aft_ray.cli import app
from aft_ray.config import load_config
from tests.deploy.test_image import DEVICES, TEXT, VERSION
from tests.deploy.test_kuberay import APPLIED, SCHEMAS, pods, rendered

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "deploy.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
IN_TEXT = [found for found in re.findall(r"`((?:kubectl|ray|aft-ray|sky|sbatch) [^`]+)`", PAGE) if found.count(" ") > 1]
COMMANDS = [re.sub(r"\s+#.*", "", line) for block in BLOCKS for line in block.splitlines()] + IN_TEXT


def parsed(group: Any, words: list[str]) -> Any:
    """Return the context of a command line of a group, click's or Typer's own. Nothing runs."""
    assert words[1] in group.commands, words
    return group.commands[words[1]].make_context(words[1], words[2:])


def check_aft_ray(words: list[str]) -> None:
    context = parsed(typer.main.get_command(app), words)
    named = context.params.get("config") or []  # one, or several runs
    for config in [named] if isinstance(named, str) else named:
        if "://" not in config:
            load_config(ROOT / config, context.params["overrides"])


def check_ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli  # seconds, which the collection of tests is spared

    context = parsed(cli, words)
    if file := context.params.get("cluster_config_file"):
        assert (ROOT / file).is_file()
    if inner := context.params.get("cmd"):
        check(inner)


def check_kubectl(words: list[str]) -> None:
    match words[1:]:
        case ["apply", "-k", folder]:
            assert folder.removeprefix("deploy/kuberay/") in APPLIED
        case ["create", "secret", "generic", name, source]:
            assert source.startswith(("--from-env-file=", "--from-file=", "--from-literal="))
            text = json.dumps([pod for folder in APPLIED for pod in pods(folder)])
            assert f'"name": "{name}"' in text, "a secret that some manifest names"
        case ["port-forward", service, port]:
            kind, name = service.split("/")
            made = {"aft-ray-head-svc": "RayCluster aft-ray", "aft-ray-serve-serve-svc": "RayService aft-ray-serve"}
            there = [f"{one['kind']} {one['metadata']['name']}" for folder in APPLIED for one in rendered(folder)]
            assert kind == "service" and made[name] in there and port in {"8000", "8265"}
        case ["get", "rayjob", name, "--watch"]:
            assert name in [one["metadata"]["name"] for one in rendered("line")]
        case ["create", "namespace", _] | ["config", "set-context", *_] | ["get", "secret", "aft-ray", *_]:
            pass
        case other:
            raise AssertionError(other)


def check_helm(words: list[str]) -> None:
    (kuberay,) = (json.loads(file.read_text()) for file in SCHEMAS if file.stem == "kuberay")
    assert f"v{words[words.index('--version') + 1]}" == kuberay["version"]
    (policy,) = (one for one in rendered("common") if one["kind"] == "NetworkPolicy")
    assert words[words.index("--namespace") + 1] in json.dumps(policy), "where the policy expects the operator"


def check_aws(words: list[str]) -> None:
    decode = pytest.importorskip("cfnlint.decode.cfn_yaml", reason="make deploy-tools installs cfn-lint")
    template = decode.loads((ROOT / words[words.index("--template-file") + 1]).read_text())
    given = {word.split("=")[0]: word.split("=")[1] for word in words[words.index("--parameter-overrides") + 1 :]}
    assert set(given) <= set(template["Parameters"])
    for name, parameter in template["Parameters"].items():
        assert name in given or "Default" in parameter
        assert re.search(parameter.get("AllowedPattern", ""), given.get(name, "")), name


def check_sky(words: list[str]) -> None:
    task = yaml.safe_load((ROOT / "deploy" / "sky.yaml").read_text())
    if "launch" not in words:
        assert words[1] == "down"
        return
    assert "deploy/sky.yaml" in words
    given = {words[place + 1].split("=")[0] for place, word in enumerate(words) if word == "--env"}
    assert given <= set(task["envs"])
    assert "RUN_DIR" in given
    assert all("=" not in words[place + 1] for place, word in enumerate(words) if word == "--secret")


def check_sbatch(words: list[str]) -> None:
    script = words.index("deploy/slurm.sbatch")
    config, *rest = words[script + 1 :]
    load_config(ROOT / config, rest[1::2])


def check_docker(words: list[str]) -> None:
    assert " ".join(words) in re.sub(r"\n#", "", TEXT).replace("  ", " ")
    version, _, device = words[words.index("--tag") + 1].removeprefix("aft-ray:").rpartition("-")
    assert version == VERSION and device in DEVICES


def check_make(words: list[str]) -> None:
    assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text()


def not_ours(words: list[str]) -> None:
    """A command of the shell, of ssh or of kind, with no file of this project in it."""
    assert not any("deploy" in word or "configs" in word for word in words)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "aft-ray": check_aft_ray,
    "ray": check_ray,
    "kubectl": check_kubectl,
    "helm": check_helm,
    "aws": check_aws,
    "sky": check_sky,
    "sbatch": check_sbatch,
    "docker": check_docker,
    "make": check_make,
    "source": not_ours,
    "ssh": not_ours,
    "kind": not_ours,
}


def check(command: str) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    CHECKS[words[0]](words)


def test_the_page_has_commands_for_every_way() -> None:
    tools = {shlex.split(command)[0] for command in COMMANDS}
    assert {"aws", "ray", "aft-ray", "kubectl", "helm", "sky", "sbatch", "docker"} <= tools


@pytest.mark.parametrize("command", sorted({command for command in COMMANDS if command.strip()}))
def test_a_command_of_the_page_is_one(command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "wrong",
    [
        "aft-ray submit pipeline --config configs/paper/llama_on_policy.yaml --sett run.dir=s3://b/x",
        "aft-ray submit pipeline --config configs/paper/llama_on_policy.yaml --set run.folder=s3://b/x",
        "ray up clusters.yaml",
        "ray attach cluster.yaml --port 8265",
        "kubectl apply -k deploy/kuberay/everything",
        "kubectl create secret generic aft-ray-environment --from-env-file=x",
        "sky launch deploy/sky.yaml --env RUN_DIRECTORY=s3://b/x",
        "docker build --tag aft-ray:latest .",
    ],
)
def test_a_wrong_command_would_be_found(wrong: str) -> None:
    with pytest.raises((AssertionError, ValueError, click.ClickException, typer.exceptions.TyperException)):
        check(wrong)


def test_files_that_the_page_names_are_there() -> None:
    places = [ROOT, ROOT / "deploy" / "kuberay"]
    for name in re.findall(r"`((?:deploy|docs|tests|configs|parts|stage|common)/[\w./-]*)`", PAGE):
        assert any((place / name).exists() for place in places), name
    for name in re.findall(r"\]\(([\w./-]+)\)", PAGE):
        assert (ROOT / "docs" / name).is_file(), name
