"""What `aft-ray submit` sends to a cluster: an allow list, packed into one archive. It becomes the job's own folder.

travels         this package, jobs/, configs/, what git tracks in a checkout, what the config names by relative path
is refused      a relative path with nothing behind it, or outside of this folder, or to a file of keys
must be there   absolute paths (storage that every node sees) and URLs
never travels   keys, tokens, .env, environments, run folders, data that no setting names
"""

from __future__ import annotations

import fnmatch
import io
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

import aft_ray
from aft_ray.config import Config, load_config
from aft_ray.config.conditions import named_engines, named_sources
from aft_ray.config.data import VERIFIERS
from aft_ray.config.loading import base_of, read_yaml
from aft_ray.data.prompts.files import GLOB
from aft_ray.data.prompts.sources import kind_of_source
from aft_ray.errors import ConfigError
from aft_ray.hub import is_hub_id
from aft_ray.models import PACKAGED
from aft_ray.pipeline.checks import named_adapters
from aft_ray.runs import COMMIT, commit

LIMIT_MIB = 100
"""Largest archive that Ray's job server takes."""
SECRETS = (
    ".env*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    ".netrc", ".pypirc", ".npmrc", "auth_token*", "credentials*", "keys.y*ml", "secrets", ".ssh", ".aws", ".gnupg",
    ".kube", ".docker",
)  # fmt: skip
"""Names of files and folders that are never sent, even where git tracks them."""
PACKAGE_FILES = (".py", ".yaml", ".jsonl", ".json", ".html", ".css", ".js", ".jinja")
SUBMITTED = "submitted"
"""Folder in the archive for a config that lies outside of this folder."""


@dataclass(frozen=True)
class Upload:
    """The files of an archive by their path in it, and the path in it of the run's config."""

    files: Mapping[str, Path | bytes]
    config: str

    def archive(self) -> bytes:
        """Return the archive; the same files give the same bytes. Raises ConfigError if Ray would not take it."""
        packed, sizes = io.BytesIO(), {}
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for name, content in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name)  # its date is fixed
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, content if isinstance(content, bytes) else content.read_bytes())
                sizes[name] = archive.getinfo(name).compress_size
        if packed.tell() > LIMIT_MIB * 2**20:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
            named = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
            raise ConfigError(
                f"submit: the files to send have {packed.tell() / 2**20:.0f} MiB, and Ray takes {LIMIT_MIB} MiB. The "
                f"largest: {named}. Put them on storage that every node sees, and name them by absolute path or URL"
            )
        return packed.getvalue()


def upload_of(config_file: str, config: Config) -> Upload:
    """Return what a job over this config needs. Raises ConfigError for what can neither travel nor be there."""
    here = Path.cwd()
    files: dict[str, Path | bytes] = {}
    for path in _ours(here):
        _add(files, here, path)
    package = Path(aft_ray.__file__).parent
    for path in package.rglob("*"):
        if path.suffix in PACKAGE_FILES and path.is_file():
            files[f"aft_ray/{path.relative_to(package)}"] = path
    files[f"aft_ray/{COMMIT}"] = (commit() or "unknown").encode()
    for key, reference in relative_references(config):
        _add_named(files, here, key, reference)
    return Upload(files, _add_config(files, here, config_file))


def joined(uploads: Sequence[Upload]) -> Upload:
    """Return what a job over several configs needs. Raises ConfigError where two of them have one name there."""
    files: dict[str, Path | bytes] = {}
    for upload in uploads:
        if files.get(upload.config, upload.files.get(upload.config)) != upload.files.get(upload.config):
            raise ConfigError(
                f"submit: two of the configs are called {Path(upload.config).name}, and configs from outside of this "
                "folder travel into one folder. Rename one"
            )
        files |= upload.files
    return Upload(files, uploads[0].config)


def _ours(here: Path) -> Iterator[Path]:
    """Yield this folder's own files: scripts, configs and, in a checkout, what git tracks."""
    yield from here.glob("jobs/*.py")
    yield from here.glob("configs/**/*.yaml")
    yield from here.glob("configs/**/*.jinja")
    if not (here / "aft_ray").is_dir():
        return
    listed = subprocess.run(
        ["git", "-C", str(here), "ls-files", "-z"], check=False, capture_output=True, text=True, timeout=60
    )
    yield from (here / name for name in listed.stdout.split("\0") if name)


def _is_secret(path: Path) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in path.parts for pattern in SECRETS)


def _add(files: dict[str, Path | bytes], here: Path, path: Path) -> None:
    """Add a file, or all files below a folder, unless its name is that of a secret."""
    inside = [path] if path.is_file() else sorted(path.rglob("*"))
    for file in inside:
        name = file.relative_to(here)
        if file.is_file() and not _is_secret(name):
            files[str(name)] = file


def _add_named(files: dict[str, Path | bytes], here: Path, key: str, reference: str) -> None:
    path = Path(reference)
    if not path.exists():
        raise ConfigError(f"submit: {key} {reference}: no such file or folder here. {ELSEWHERE}")
    if not path.resolve().is_relative_to(here.resolve()):
        raise ConfigError(
            f"submit: {key} {reference} lies outside of this folder, and only this folder travels. {ELSEWHERE}"
        )
    if _is_secret(path):
        raise ConfigError(f"submit: {key} {reference} has the name of a secret, and secrets never travel. {ELSEWHERE}")
    _add(files, here, here / path)


ELSEWHERE = "Give an absolute path that every node sees, or a URL"


def relative_references(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the settings of a run that name a file or folder by a relative path, and the path.

    Raises ConfigError for files of keys, which never travel.
    """
    for key, kept in (
        ("serving.keys_file", config.serving.keys_file),
        ("run.environment_file", config.run.environment_file),
    ):
        if kept is not None and not _is_elsewhere(kept):
            raise ConfigError(f"submit: {key} {kept}: secrets never travel. Give an absolute path that every node has")
    for key, reference in _models(config):
        if reference not in PACKAGED and not is_hub_id(reference) and not _is_elsewhere(reference):
            yield key, reference
    for key, reference in _paths(config):
        if not _is_elsewhere(reference):
            yield key, reference
    if config.scores.verifier is not None and config.scores.verifier not in VERIFIERS:
        package = config.scores.verifier.partition(":")[0].partition(".")[0]
        found = [name for name in (package, f"{package}.py") if Path(name).exists()]
        yield from (("scores.verifier", name) for name in found)  # elsewhere it must be installed
    if config.miniature is not None:
        yield from relative_references(load_config(config.miniature))


def _is_elsewhere(reference: str) -> bool:
    return "://" in reference or reference.startswith(("/", "~"))


def _models(config: Config) -> Iterator[tuple[str, str]]:
    for key, engine in named_engines(config):
        if engine.type in {"vllm", "transformers"}:
            yield f"{key}.model", engine.model
    if config.scores.reward_model is not None:
        yield "scores.reward_model", config.scores.reward_model


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    adapters = [*named_adapters(config), ("training.init_adapter", config.training.init_adapter)]
    yield from ((key, adapter) for key, adapter in adapters if adapter is not None and not is_hub_id(adapter))
    for key, engine in named_engines(config):
        if engine.type == "scripted" and engine.tokenizer is not None:
            yield f"{key}.tokenizer", engine.tokenizer
    for section, templates in (("templates", config.templates), ("serving.templates", config.serving.templates)):
        for kind, reference in (("aggregator", templates.aggregator), ("in_context", templates.in_context)):
            if reference.endswith((".yaml", ".yml")):
                yield f"{section}.{kind}", reference
    for key, source in named_sources(config):
        if kind_of_source(source) == "files" and not GLOB.search(source):
            yield key, source
        elif kind_of_source(source) == "files":  # the folder in which the pattern is looked for
            yield key, source[: GLOB.search(source).start()].rpartition("/")[0] or "."  # type: ignore[union-attr]
    if config.miniature is not None:
        yield from (("miniature", str(path)) for path in config_files(config.miniature))


def config_files(config_file: str) -> Iterator[Path | str]:
    """Yield a config and the `base:` files that it is merged over."""
    place: Path | str = config_file
    while True:
        yield place
        if "://" in str(place):
            return
        base = (yaml.safe_load(Path(place).read_text()) or {}).get("base")
        if base is None:
            return
        place = base_of(place, base)


def _add_config(files: dict[str, Path | bytes], here: Path, config_file: str) -> str:
    """Add the run's config and return its path in the archive. One from outside is added as a single file."""
    if "://" in config_file:
        return config_file
    chain = [Path(place) for place in config_files(config_file) if "://" not in str(place)]
    if all(path.resolve().is_relative_to(here.resolve()) for path in chain):
        for path in chain:
            files[str(path.resolve().relative_to(here.resolve()))] = path
        return str(Path(config_file).resolve().relative_to(here.resolve()))
    name = f"{SUBMITTED}/{Path(config_file).name}"
    files[name] = yaml.safe_dump(read_yaml(config_file), sort_keys=False).encode()
    return name
