"""Writes a training set as conversations, for other trainers: TRL, axolotl, LLaMA-Factory.

    write_dataset(run, Path("exports/data"), file_format="jsonl")

    exports/data/
      README.md               the data card, with the head that the Hugging Face hub reads
      dataset_info.json       what LLaMA-Factory reads
      aft/train.jsonl         {"messages": [...], "example_id": ..., "prompt_id": ...}
      aft/held_out.jsonl      the same of the prompts that no training may use
      sft/train.jsonl ...     one folder per variant

`messages` are what the model sees, drafts included, and the target as the assistant's last message: the conversations
whose ids `training_set/` holds. Examples that the stage left out or could not make are in neither.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.config import Config
from aft_ray.data.card import CARD
from aft_ray.data.targets import last_stage
from aft_ray.data.training_set import TrainingSetWorker, examples_of
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import HELD_OUT, MESSAGE, TRAIN, Message
from aft_ray.runs import Run
from aft_ray.storage import whole_folder

FileFormat = Literal["jsonl", "parquet"]
SCHEMA = pa.schema([("messages", pa.list_(MESSAGE)), ("example_id", pa.string()), ("prompt_id", pa.string())])
LICENSES = (
    "apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "odc-by",
    "odbl",
)  # fmt: skip
"""The hub's names of common licences. Others are written as `other` with their own name."""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_dataset(run: Run, output: Path, file_format: FileFormat = "jsonl") -> dict[str, int]:
    """Write the folder `output`, whole or not at all, and return the number of examples by file.

    Raises InputError if the run has no finished training set, and ConfigError if `output` exists.
    """
    manifest = run.manifest("training_set")
    if manifest is None or manifest.status != "done":
        place = run.folder.child("training_set").location
        raise InputError(f"{place}: not finished. Run: aft-ray run --until training_set")
    output = output.expanduser().absolute()
    if output.exists():
        raise ConfigError(f"--output {output} exists: name another folder, or remove this one")
    with whole_folder(output) as folder:
        counts = _write_files(run, folder, file_format)
        (folder / "README.md").write_text(hub_card(run, counts), encoding="utf-8")
        (folder / "dataset_info.json").write_text(json.dumps(_llama_factory(counts), indent=1))
    return counts


def _write_files(run: Run, folder: Path, file_format: FileFormat) -> dict[str, int]:
    writers: dict[str, Any] = {}
    counts: dict[str, int] = {}
    try:
        for variant, split, row in conversations(run):
            name = f"{variant}/{split}.{file_format}"
            if name not in writers:
                (folder / variant).mkdir(exist_ok=True)
                writers[name] = _Writer(folder / name, file_format)
            writers[name].write(row)
            counts[name] = counts.get(name, 0) + 1
    finally:
        for writer in writers.values():
            writer.close()
    return dict(sorted(counts.items()))


class _Writer:
    """A file of conversations. Parquet is written in groups of rows, so memory stays constant."""

    def __init__(self, path: Path, file_format: FileFormat) -> None:
        self._rows: list[dict[str, Any]] = []
        self._lines = path.open("w", encoding="utf-8") if file_format == "jsonl" else None
        self._table = pq.ParquetWriter(path, SCHEMA) if file_format == "parquet" else None

    def write(self, row: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            return
        self._rows.append(row)
        if len(self._rows) == 1_000:
            self._flush()

    def _flush(self) -> None:
        assert self._table is not None
        self._table.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._rows = []

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._table is not None:
            self._flush()
            self._table.close()


def conversations(run: Run) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield variant, split and conversation of every example of the training set, in its order."""
    config = run.config
    source, made = run.folder.child(last_stage(config)), run.folder.child("training_set")
    worker = TrainingSetWorker(config.training_set, config.engine, config.templates, config.run.seed)
    for name in made.names(".parquet"):
        wanted = set(made.read_table(name, ["example_id"])["example_id"].to_pylist())
        for row in source.read_table(name).to_pylist():
            for variant, example_id, messages in _of_row(worker, row, wanted):
                yield (
                    variant,
                    row["split"],
                    {"messages": messages, "example_id": example_id, "prompt_id": row["prompt_id"]},
                )


def _of_row(
    worker: TrainingSetWorker, row: Mapping[str, Any], wanted: set[str]
) -> Iterator[tuple[str, str, list[Message]]]:
    if not any(example_id.startswith(row["prompt_id"]) for example_id in wanted):
        return  # the row was left out or failed
    for variant in worker.config.variants:
        for example_id, target, shown in examples_of(row, variant, worker.config.thinking):
            if example_id in wanted:
                messages, _ = worker.shown_messages(row, target, shown)
                yield variant, example_id, [*messages, Message(role="assistant", content=target)]


# ── the card ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def hub_card(run: Run, counts: Mapping[str, int]) -> str:
    """Return the data card of a run with the head that the hub reads: licence, size, and the files of each variant."""
    import yaml

    variants = list(dict.fromkeys(name.partition("/")[0] for name in counts))
    files: Any = [
        {
            "config_name": variant,
            "data_files": [
                {"split": _split_of(name), "path": name} for name in counts if name.startswith(f"{variant}/")
            ],
        }
        for variant in variants
    ]
    head = {
        **_license(run.config),
        "task_categories": ["text-generation"],
        "tags": ["aggregation-fine-tuning", "aft_ray"],
        "size_categories": [next((size for most, size in SIZES if sum(counts.values()) < most), "n>1M")],
        "configs": files,
    }
    body = run.folder.child("training_set").read_bytes(CARD).decode()
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{body}"


def _split_of(name: str) -> str:
    return {TRAIN: "train", HELD_OUT: "test"}[Path(name).stem]


def _license(config: Config) -> dict[str, str]:
    name = config.prompts.license
    if name is None:
        return {}
    known = name.strip().lower().replace(" ", "-")
    return {"license": known} if known in LICENSES else {"license": "other", "license_name": known}


def _llama_factory(counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the entries of LLaMA-Factory's dataset_info.json, one per file."""
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    return {
        name.rpartition(".")[0].replace("/", "_"): {
            "file_name": name,
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {**roles, "system_tag": "system"},
        }
        for name in counts
    }
