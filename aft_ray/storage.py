"""Files and folders that appear whole or not at all: each is written under another name, then renamed.

folder = Folder.at("runs/quickstart").child("proposals")     # or "s3://bucket/run"
folder.write_table("shard-00000.parquet", table)

with whole_folder(Path("exports/aft")) as partial:           # a local folder of files that libraries write
    model.save_pretrained(partial)
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

PARTIAL = ".partial"
"""Suffix of a file or folder that is being written. What a killed process left of one is never read."""


@dataclass(frozen=True)
class Folder:
    """One folder. It can be pickled; file names are relative to it."""

    fs: pafs.FileSystem
    path: str

    @classmethod
    def at(cls, location: str | Path) -> Folder:
        """Return the folder at a local path or at a URI that pyarrow knows (`s3://`, `gs://`, `file://`)."""
        if "://" in str(location):
            fs, path = pafs.FileSystem.from_uri(str(location))
            return cls(fs, path.rstrip("/"))
        return cls(pafs.LocalFileSystem(), str(Path(location).expanduser().absolute()))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def child(self, name: str) -> Folder:
        return Folder(self.fs, f"{self.path}/{name}")

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def partial(self, name: str) -> str:
        """Return a new path at which to write the file before it is moved into place."""
        return self.file(f"{name}.{os.getpid()}-{uuid4().hex[:8]}{PARTIAL}")

    def exists(self, name: str = "") -> bool:
        found = self.fs.get_file_info(self.file(name) if name else self.path).type
        return bool(found != pafs.FileType.NotFound)

    def names(self, suffix: str = "") -> list[str]:
        """Return the sorted names of the complete files in this folder, not below it, that end with `suffix`."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        files = [info.base_name for info in infos if info.type == pafs.FileType.File]
        return sorted(name for name in files if name.endswith(suffix) and not name.endswith(PARTIAL))

    def read_bytes(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.file(name)) as stream:
            return stream.read()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file. Readers see the old content or the new, never a part."""
        self.fs.create_dir(self.path, recursive=True)
        partial = self.partial(name)
        with self.fs.open_output_stream(partial) as stream:
            stream.write(content)
        if self.is_local:
            with open(partial, "rb") as handle:
                os.fsync(handle.fileno())
        self.fs.move(partial, self.file(name))

    def remove(self, name: str) -> None:
        self.fs.delete_file(self.file(name))

    def append_line(self, name: str, line: str) -> None:
        """Add one line to a log file that has a single writer. Object storage cannot append: there it is rewritten."""
        if self.is_local:
            self.fs.create_dir(self.path, recursive=True)
            with open(self.file(name), "a", encoding="utf-8") as log:
                log.write(line + "\n")
        else:
            before = self.read_bytes(name) if self.exists(name) else b""
            self.write_bytes(name, before + line.encode() + b"\n")

    def folder_names(self) -> list[str]:
        """Return the sorted names of the folders in this one, not below it."""
        infos = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        chosen = None if columns is None else list(columns)
        return pq.read_table(self.file(name), filesystem=self.fs, partitioning=None, columns=chosen)

    def write_table(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write_bytes(name, sink.getvalue().to_pybytes())

    def read_metadata(self, name: str) -> dict[bytes, bytes]:
        """Return the key-value pairs in the footer of a Parquet file."""
        return dict(pq.read_schema(self.file(name), filesystem=self.fs).metadata or {})

    def num_rows(self, name: str) -> int:
        """Return the number of rows of a Parquet file, from its footer."""
        with self.fs.open_input_file(self.file(name)) as file:
            return int(pq.ParquetFile(file).metadata.num_rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return every row of every Parquet shard, in shard order. Use it for small sets: cards, reports, tests."""
        return [row for name in self.names(".parquet") for row in self.read_table(name).to_pylist()]

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read_bytes(name)).hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write one local file. Readers see the old content or the new, never a part."""
    Folder.at(file.parent).write_bytes(file.name, text.encode())


def partial_folder(folder: Path) -> Path:
    """Return the path at which a local folder is written before it is renamed."""
    return folder.with_name(folder.name + PARTIAL)


def empty_partial(folder: Path) -> Path:
    """Create the `partial_folder` of `folder`, empty, and return it. What a killed process left there is removed."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into, and rename it to `folder` when the block ends without an error."""
    partial = empty_partial(folder)
    yield partial
    partial.rename(folder)
