"""Models and adapters of the Hugging Face hub, at one revision.

    split("owner/name#v1.0")       -> ("owner/name", "v1.0")         a commit, tag or branch; None where there is none
    snapshot("owner/name#v1.0")    -> the folder of that revision in this node's cache, fetched where it is missing
    origin(that folder)            -> HubCommit(id="owner/name", revision="a09a354...")

What is named with a revision is always loaded from such a folder, so tokenizer, settings and weights are of one commit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from aft_ray.errors import ConfigError, StorageError

DESCRIPTION = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt")
"""The files of a model besides its weights."""
COPIES = ("original/*", "consolidated*")
"""The same weights again, in the form of those who made them."""


@dataclass(frozen=True, kw_only=True)
class HubCommit:
    """A repository of the hub at one commit."""

    id: str
    revision: str

    @property
    def reference(self) -> str:
        return f"{self.id}#{self.revision}"


def split(reference: str) -> tuple[str, str | None]:
    """Return the id and the revision that a reference names."""
    name, _, revision = reference.partition("#")
    return name, revision or None


def is_hub_id(reference: str) -> bool:
    """Whether a reference has the form OWNER/NAME or OWNER/NAME#REVISION. A folder of that name comes first."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(#[\w./-]+)?", reference) is not None
    return is_id and not Path(reference).exists()


def check_repository(repo: str) -> None:
    """Raise ConfigError unless a name has the form OWNER/NAME, as the hub's repositories have."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo) is None:
        name = repo.strip("/").rpartition("/")[2] or "NAME"
        raise ConfigError(
            f"{repo}: expected OWNER/NAME, such as me/{name}: the user or organisation of the hub that the repository "
            "belongs to, and its name"
        )


def snapshot(reference: str, weights: bool = True) -> Path:
    """Return the folder of a repository at its revision (the newest where none is named), on the node that calls.

    Without `weights`, those may be missing from it. Raises ConfigError for what the hub does not have or does not give,
    and StorageError where it does not answer and this node has no copy.
    """
    found = _fetch(reference, (*DESCRIPTION, "*.safetensors") if weights else DESCRIPTION)
    if weights and not any(found.rglob("*.safetensors")):
        found = _fetch(reference, (*DESCRIPTION, "*.bin"))
    return found


def _fetch(reference: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = split(reference)
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(COPIES))
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"{reference}: no such folder here, and the hub does not give it: {_first_line(error)}"
        ) from error
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{reference}: no such folder here, no cached copy, and the hub does not answer: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def origin(folder: str | Path) -> HubCommit | None:
    """Return what a folder in a hub cache holds, from its path; None for any other folder."""
    found = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$", Path(folder).as_posix())
    return None if found is None else HubCommit(id=f"{found[1]}/{found[2]}", revision=found[3])
