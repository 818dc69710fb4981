"""`aft-ray push`: uploads a training set, an adapter or a merged model of a run to the Hugging Face hub.

    push(config, "me/my-data", "dataset", ...)      the folder that `aft-ray dataset` writes
    push(config, "me/my-aft", "adapter", ...)       the folder that `aft-ray export` writes
    push(config, "me/my-model", "merged", ...)      the folder that `aft-ray export --merged` writes

The token is the one that `hf auth login` stored, or HF_TOKEN; HF_ENDPOINT names another hub.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from aft_ray.config import Config
from aft_ray.data.messages import FileFormat, write_dataset
from aft_ray.errors import ConfigError, InputError
from aft_ray.runs import Run
from aft_ray.storage import Folder

What = Literal["dataset", "adapter", "merged"]


def push(
    config: Config,
    repo: str,
    what: What,
    *,
    variant: str | None = None,
    file_format: FileFormat = "jsonl",
    private: bool = False,
    dry_run: bool = False,
) -> str:
    """Upload to the repository `repo`, which is made if it is not there, and return its URL.

    With `dry_run`, print what would be uploaded and return the URL that it would have. Raises ConfigError when the hub
    refuses, and what `write_dataset` and `export_model` raise.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    kind = "dataset" if what == "dataset" else "model"
    url = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    with TemporaryDirectory(prefix="aft-ray-") as scratch:
        folder = Path(scratch) / "upload"
        message = f"{_write(config, folder, what, variant, file_format)} of {Folder.at(config.run.dir).name}"
        for file in (files := sorted(path for path in folder.rglob("*") if path.is_file())):
            print(f"{file.stat().st_size:>14,} bytes  {file.relative_to(folder)}")
        if dry_run:
            print(f"{len(files)} files would go to {url} ({'private' if private else 'public'} if it is new)")
            return url
        try:
            api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message)
        except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
            cause = " ".join(str(error).split())
            raise ConfigError(
                f"{url}: the hub refused the upload: {cause[:300]}. Check the name OWNER/NAME, the connection, "
                "and that HF_TOKEN (or `hf auth login`) may write there"
            ) from None
    print(f"{len(files)} files are at {url}")
    return url


def _write(config: Config, folder: Path, what: What, variant: str | None, file_format: FileFormat) -> str:
    """Write what is to be uploaded to `folder`, and return what it is in words."""
    if what == "dataset":
        counts = write_dataset(Run(config, Folder.at(config.run.dir)), folder, file_format)
        if not counts:
            raise InputError(f"{config.run.dir}: the training set has no examples")
        return "Training set"
    from aft_ray.training.export import export_model, find_trained

    trained = find_trained(config, variant, shlex.join(["aft-ray", "run", "--until", "train"]))
    export_model(trained, folder, merged=what == "merged")
    return f"{'Merged model' if what == 'merged' else 'Adapter'} {trained.variant}"
