"""The secrets of a run go by reference: a config names variables, and every worker finds the values on its own node.

    run.environment: [HF_TOKEN]                        names that every worker must have; `api_key_env` is among them
    run.environment_file: /run/secrets/aft_ray.env     where it finds those that its environment lacks, NAME=VALUE

Ray writes the environment that a job is given (`runtime_env`) in plain text into its metadata, dashboard and logs. So
no value ever goes there: workers are told the name of the file, and read it when they start. Before the first token one
worker of each node says which names it lacks, and whether it sees the place of the run.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from aft_ray.config import Config
from aft_ray.config.conditions import placed_engines
from aft_ray.errors import ConfigError, InputError
from aft_ray.storage import Folder, check_writable

CHECK_TIMEOUT_S = 300.0
"""Seconds for a node to start a worker and answer."""


def names_needed(config: Config) -> tuple[str, ...]:
    """Return the names of all variables that workers must have, sorted."""
    keys = [engine.api_key_env for _, engine, _ in placed_engines(config) if engine.type == "openai"]
    if config.evaluation.base_url is not None:
        keys.append(config.evaluation.api_key_env)
    return tuple(sorted({*config.run.environment, *(key for key in keys if key is not None)}))


def read_environment(config: Config) -> None:
    """Read the variables that this process lacks from `run.environment_file`.

    Raises InputError for a broken file, and ConfigError if a name of `run.environment` has no value here then.
    """
    if config.run.environment_file is not None:
        _read(config.run.environment_file, names_needed(config))
    check_names(config.run.environment, config.run.environment_file)


def _read(file: str, names: Sequence[str]) -> None:
    found = parse(Path(file).expanduser(), file)
    for name in names:
        if name in found:
            os.environ.setdefault(name, found[name])


def parse(path: Path, shown: str) -> dict[str, str]:
    """Return the variables of a file. Its values stand in no message. Raises InputError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"run.environment_file {shown} on {socket.gethostname()}: {type(error).__name__}") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        line = line.strip().removeprefix("export ")
        if not line or line.startswith("#"):
            continue
        name, separator, value = line.partition("=")
        if not separator or not name.strip().isidentifier():
            raise InputError(f"run.environment_file {shown}, line {number}: expected NAME=VALUE")
        found[name.strip()] = value.strip().strip("'\"")
    return found


def setup_hook(config: Config) -> Callable[[], None] | None:
    """Return what every worker process runs when it starts: it reads the file of its node. None without a file."""
    if config.run.environment_file is None:
        return None
    file, names = config.run.environment_file, names_needed(config)

    def read_environment_file() -> None:
        if Path(file).expanduser().is_file():  # where it is missing, the check of the nodes says so
            _read(file, names)

    return read_environment_file


def check_names(names: Sequence[str], file: str | None) -> None:
    """Raise ConfigError when this process lacks one of the variables."""
    lacking = _lacking(names)
    if lacking:
        raise ConfigError(_sentence({socket.gethostname(): lacking}, file))


def _lacking(names: Sequence[str]) -> list[str]:
    return [name for name in names if not os.environ.get(name)]


def _sentence(lacking: dict[str, list[str]], file: str | None) -> str:
    where = "; ".join(f"{', '.join(names)} on {host}" for host, names in lacking.items())
    if file is None:
        remedy = "set them there, or name a file of every node in run.environment_file"
    else:
        remedy = f"set them there, or add them to {file} (run.environment_file) there"
    return f"environment variables are missing: {where}. To mend it, {remedy}"


def check_nodes(config: Config) -> None:
    """Ask a worker of every node for the run's variables and place. Raises ConfigError with what is missing where."""
    names, run = names_needed(config), Folder.at(config.run.dir)
    probe = f".probe-{uuid4().hex[:8]}"
    run.write_bytes(probe, b"")
    try:
        answers = {
            host: ([], f"cannot run this package: {found!r}") if isinstance(found, Exception) else found
            for host, found in ask_nodes(look_around, names, config.run.dir, probe).items()
        }
    finally:
        run.remove(probe)
    lacking = {host: missing for host, (missing, _) in answers.items() if missing}
    if lacking:
        raise ConfigError(_sentence(lacking, config.run.environment_file))
    for host, (_, problem) in answers.items():
        if problem:
            raise ConfigError(f"run.dir {config.run.dir}: {host} {problem}")


def ask_nodes(question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Call a function in a worker of every node; return its answers by host. An exception of its is an answer, too.

    A node that does not answer in time is left out.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[Any, str] = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)  # it may be lost while it is asked
            on_it: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": there}
            host = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            asked[ray.remote(**on_it)(question).remote(*arguments)] = host
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=CHECK_TIMEOUT_S)
    return {asked[answer]: _answer_of(answer) for answer in answered}


def _answer_of(answer: Any) -> Any:
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        return error.cause


def look_around(names: Sequence[str], location: str, probe: str) -> tuple[list[str], str]:
    """Return the variables that this node's workers lack, and what is wrong with the run's place here, or nothing."""
    problem = ""
    try:
        if not Folder.at(location).exists(probe):
            problem = "does not see what the driver writes there: use a file system that all nodes share, or a URL"
        else:
            check_writable(location)
    except (ConfigError, OSError) as error:
        problem = f"cannot use it: {error}"
    return _lacking(names), problem
