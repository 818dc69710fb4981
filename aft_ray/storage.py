"""Files and folders that appear whole or not at all, on a file system or on object storage.

folder = Folder.at("runs/quickstart").child("proposals")     # or "s3://bucket/run"
folder.write_table("shard-00000.parquet", table)

with whole_folder(Path("exports/aft")) as partial:           # a local folder of files that libraries write
    model.save_pretrained(partial)

local_copy("s3://bucket/run/model/aft")                      # a folder of this node with the same files

On a file system a file is written under another name, then renamed. On object storage it appears when its upload ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from aft_ray.errors import ConfigError, StorageError

PARTIAL = ".partial"
"""Suffix of a file or folder that is being written. What a killed process left of one is never read."""


Stamp = tuple[int, int, str]
"""Size, time of the last change in nanoseconds, and entity tag of a file (empty on a file system)."""
OBJECT_STORES = frozenset({"s3", "gcs", "abfs"})
"""pyarrow's names of the storages in which an object appears when its upload ends, and which have no folders."""
SCHEMES = ("s3", "gs", "file")
PATIENCE_S = 30
"""Seconds for which a request to Google's storage is repeated; pyarrow's own 15 minutes look like a hang."""


@dataclass(frozen=True)
class Folder:
    """One folder. It can be pickled; file names are relative to it. Its methods raise StorageError."""

    fs: pafs.FileSystem
    path: str
    scheme: str = ""
    """`s3`, `gs`, or empty for a local path."""

    @classmethod
    def at(cls, location: str | Path) -> Folder:
        """Return the folder at a local path or at a URL (`s3://`, `gs://`, `file://`).

        Raises ConfigError for another scheme and for a URL without a bucket.
        """
        scheme, separator, rest = str(location).partition("://")
        if not separator:
            _refuse_one_slash(str(location))
            return cls(pafs.LocalFileSystem(), str(Path(location).expanduser().absolute()))
        if scheme not in SCHEMES:
            raise ConfigError(
                f"{location}: unknown scheme {scheme}://; expected a path, s3://BUCKET/PATH or gs://BUCKET/PATH"
            )
        if scheme != "file" and not rest.partition("/")[0]:
            raise ConfigError(f"{location}: no bucket; expected {scheme}://BUCKET/PATH")
        try:
            uri = str(location)
            if scheme == "gs" and "?" not in uri:
                uri += f"?retry_limit_seconds={PATIENCE_S}"
            fs, path = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ConfigError(f"{location}: {storage_reason(error)}") from None
        return cls(fs, path.rstrip("/"), "" if scheme == "file" else scheme)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def location(self) -> str:
        """The absolute path or URL: what `at` takes, and what a message shows."""
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        return Folder(self.fs, self.path.rpartition("/")[0], self.scheme)

    def child(self, name: str) -> Folder:
        return Folder(self.fs, f"{self.path}/{name}", self.scheme)

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def partial(self, name: str) -> str:
        """Return a new path at which to write the file before it is moved into place."""
        return self.file(f"{name}.{os.getpid()}-{uuid4().hex[:8]}{PARTIAL}")

    def exists(self, name: str = "") -> bool:
        with self.reached("looked up", name):
            found = self.fs.get_file_info(self.file(name) if name else self.path).type
        return bool(found != pafs.FileType.NotFound)

    def is_empty(self) -> bool:
        """Whether nothing lies in this folder, or it is not there."""
        return not self._listed()

    def names(self, suffix: str = "") -> list[str]:
        """Return the sorted names of the complete files in this folder, not below it, that end with `suffix`."""
        return [name for name in self.files() if name.endswith(suffix)]

    def files(self) -> dict[str, pafs.FileInfo]:
        """Return the complete files in this folder, not below it, by name, sorted."""
        with self.reached("listed"):
            infos = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True))
        found = {info.base_name: info for info in infos if info.type == pafs.FileType.File}
        return {name: found[name] for name in sorted(found) if not name.endswith(PARTIAL)}

    def stamp(self, name: str, info: pafs.FileInfo) -> Stamp:
        """Return what changes whenever the content of a file does, without reading it.

        S3 tells the time of a change in whole seconds only, so object storage is asked for the file's entity tag too.
        """
        if self.fs.type_name not in OBJECT_STORES:
            return info.size, info.mtime_ns or 0, ""
        with self.reached("looked up", name), self.fs.open_input_stream(self.file(name)) as stream:
            tags = {key.lower(): value.decode() for key, value in (stream.metadata() or {}).items()}
        return info.size, info.mtime_ns or 0, tags.get("etag", "")

    def read_bytes(self, name: str) -> bytes:
        with self.reached("read", name), self.fs.open_input_stream(self.file(name)) as stream:
            return stream.read()

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file. Readers see the old content or the new, never a part."""
        with self.reached("written", name):
            if self.fs.type_name in OBJECT_STORES:
                with self.fs.open_output_stream(self.file(name)) as stream:
                    stream.write(content)
                return
            self.fs.create_dir(self.path, recursive=True)
            partial = self.partial(name)
            try:
                with self.fs.open_output_stream(partial) as stream:
                    stream.write(content)
                if self.is_local:
                    with open(partial, "rb") as handle:
                        os.fsync(handle.fileno())
                self.fs.move(partial, self.file(name))
            except OSError:
                with contextlib.suppress(OSError):  # a full disk must not keep the part
                    self.fs.delete_file(partial)
                raise

    def remove(self, name: str) -> None:
        with self.reached("removed", name):
            self.fs.delete_file(self.file(name))

    def append_line(self, name: str, line: str) -> None:
        """Add one line to a log file that has a single writer. Object storage cannot append: there it is rewritten."""
        if self.is_local:
            with self.reached("written", name):
                self.fs.create_dir(self.path, recursive=True)
                with open(self.file(name), "a", encoding="utf-8") as log:
                    log.write(line + "\n")
        else:
            before = self.read_bytes(name) if self.exists(name) else b""
            self.write_bytes(name, before + line.encode() + b"\n")

    def folder_names(self) -> list[str]:
        """Return the sorted names of the complete folders in this one, not below it."""
        names = {first for first, slash, _ in (self._below(info).partition("/") for info in self._listed()) if slash}
        return sorted(name for name in names if not name.endswith(PARTIAL))

    def _listed(self) -> list[pafs.FileInfo]:
        """Return what lies in this folder; on Google's storage all below it, since only objects show a folder there."""
        is_google = self.fs.type_name == "gcs"
        with self.reached("listed"):
            found = self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True, recursive=is_google))
        return list(found)

    def _below(self, info: pafs.FileInfo) -> str:
        """Return the path of something in this folder, relative to it. That of a folder ends with a slash."""
        path = str(info.path).removeprefix(f"{self.path}/")
        return f"{path}/" if info.type == pafs.FileType.Directory else path

    def remove_folder(self, name: str) -> None:
        """Remove a folder in this one and what lies in it."""
        with self.reached("removed", name):
            self.fs.delete_dir_contents(self.file(name))
            if self.exists(name):  # on object storage a folder may be no more than its objects
                self.fs.delete_dir(self.file(name))

    def remove_partial(self) -> None:
        """Remove what killed or failed writers left in this folder and below it; nobody may be writing there.

        Object storage has none: there, a file appears when its upload ends.
        """
        if not self.is_local:
            return
        with self.reached("cleaned"):
            for root, folders, files in os.walk(self.path):
                for name in [name for name in folders if name.endswith(PARTIAL)]:
                    shutil.rmtree(os.path.join(root, name))
                    folders.remove(name)
                for name in files:
                    if name.endswith(PARTIAL):
                        os.remove(os.path.join(root, name))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        chosen = None if columns is None else list(columns)
        with self.reached("read", name):
            return pq.read_table(self.file(name), filesystem=self.fs, partitioning=None, columns=chosen)

    def write_table(self, name: str, table: pa.Table) -> str:
        """Write a Parquet file, and return the sha256 of its bytes."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        content = sink.getvalue().to_pybytes()
        self.write_bytes(name, content)
        return hashlib.sha256(content).hexdigest()

    def read_metadata(self, name: str) -> dict[bytes, bytes]:
        """Return the key-value pairs in the footer of a Parquet file."""
        with self.reached("read", name):
            return dict(pq.read_schema(self.file(name), filesystem=self.fs).metadata or {})

    def num_rows(self, name: str) -> int:
        """Return the number of rows of a Parquet file, from its footer."""
        with self.reached("read", name), self.fs.open_input_file(self.file(name)) as file:
            return int(pq.ParquetFile(file).metadata.num_rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return every row of every Parquet shard, in shard order. Use it for small sets: cards, reports, tests."""
        return [row for name in self.names(".parquet") for row in self.read_table(name).to_pylist()]

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read_bytes(name)).hexdigest()

    def json_lines(self, name: str) -> list[dict[str, Any]]:
        """Return the complete lines of a log file; none where there is no file. A last line without an end is left."""
        if not self.exists(name):
            return []
        lines = self.read_bytes(name).decode().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @contextmanager
    def reached(self, done: str, name: str = "") -> Iterator[None]:
        """Raise what goes wrong in the block as a StorageError that names the file.

        A file that is read and not there stays a FileNotFoundError.
        """
        try:
            yield
        except OSError as error:
            if isinstance(error, FileNotFoundError) and done == "read":
                raise
            place = f"{self.location}/{name}" if name else self.location
            raise StorageError(f"{place}: cannot be {done}: {storage_reason(error)}") from error


def _refuse_one_slash(location: str) -> None:
    scheme, separator, rest = location.partition(":/")
    if separator and scheme in SCHEMES:
        raise ConfigError(f"{location}: a URL has two slashes: {scheme}://{rest}")


NO_BUCKET = "there is no such bucket"
REASONS = {
    "NO_SUCH_BUCKET": NO_BUCKET,
    "ACCESS_DENIED": "access is denied; check the credentials and the bucket's policy",
    "INVALID_ACCESS_KEY_ID": "the storage does not know this access key",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key does not fit the access key",
    "NETWORK_CONNECTION": "the storage does not answer; check the network and AWS_ENDPOINT_URL",
    "Could not create credentials": "no credentials were found",
    "INVALID_CLIENT_TOKEN_ID": "the storage does not know these credentials",
}
"""What pyarrow's and AWS's words mean."""


def storage_reason(error: Exception) -> str:
    """Return one sentence for an error of a file system or of an object store."""
    if detail := re.search(r"\[errno \d+\] ([^\[\]]+)$", str(error)):  # the end of pyarrow's own sentence
        return detail.group(1).strip()
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    for words, reason in REASONS.items():
        if words in text:
            return reason
    found = re.search(r"AWS Error .*? operation: (.*?)( \(Request ID.*)?$", text)
    return found.group(1) if found else text


def check_writable(location: str) -> None:
    """Write a small file into a folder, read it and remove it. Raises ConfigError with one sentence if that fails."""
    folder = Folder.at(location)
    probe = f".probe-{uuid4().hex[:8]}"
    try:
        folder.write_bytes(probe, probe.encode())
        found = folder.read_bytes(probe)
        folder.remove(probe)
    except (StorageError, OSError, pa.ArrowException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        # an object needs no folder, so that only its bucket can be missing
        is_bucket = not folder.is_local and isinstance(cause, FileNotFoundError)
        reason = NO_BUCKET if is_bucket else storage_reason(cause)
        raise ConfigError(f"{location}: this place cannot hold a run: {reason}") from None
    if found != probe.encode():
        raise ConfigError(f"{location}: this place cannot hold a run: a file that was written reads differently")


# ── local folders ─────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── this node's copies ────────────────────────────────────────────────────────────────────────────────────────────────


COPIES_FOLDER = "copies"
"""Where in the cache the copies of folders on object storage lie."""


def cache_dir() -> Path:
    """Return the folder of this node that keeps converted models and copies of folders on object storage."""
    return Path(os.environ.get("AFT_RAY_CACHE", "~/.cache/aft_ray")).expanduser()


def local_copy(location: str | Path) -> Path:
    """Return a local folder with the files of `location`: itself if it is a path, else this node's copy of the URL.

    A copy is fetched once per node, and again when the files of the URL have changed. Raises ConfigError when there is
    no such folder.
    """
    folder = Folder.at(location)
    if folder.is_local:
        return Path(folder.path)
    files = list_files(folder)
    if not files:
        raise ConfigError(f"{location}: no such folder")
    stamps = [(name, folder.stamp(name, info)) for name, info in files.items()]
    key = hashlib.sha256(f"{folder.location}{stamps}".encode()).hexdigest()[:16]
    copy = cache_dir() / COPIES_FOLDER / f"{folder.name}-{key}"
    if not copy.is_dir():
        from filelock import FileLock

        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{copy}.lock"):
            if not copy.is_dir():
                with whole_folder(copy) as partial:
                    _fetch(folder, files, partial)
    return copy


def list_files(folder: Folder) -> dict[str, pafs.FileInfo]:
    """Return the complete files in a folder and below it, by their path relative to it, sorted."""
    with folder.reached("listed"):
        infos = folder.fs.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True, recursive=True))
    files = {info.path.removeprefix(f"{folder.path}/"): info for info in infos if info.type == pafs.FileType.File}
    return {name: files[name] for name in sorted(files) if not name.endswith(PARTIAL)}


def _fetch(folder: Folder, files: dict[str, pafs.FileInfo], into: Path) -> None:
    for name in files:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        with (
            folder.reached("read", name),
            folder.fs.open_input_stream(folder.file(name)) as source,
            (into / name).open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy, length=8 * 2**20)


HASHED_WHOLE = 64 * 2**20
"""Files up to this many bytes are hashed whole."""
SAMPLE, NUM_SAMPLES = 4096, 256
"""Bytes of every tensor of a larger file that count, and the number of such samples where its tensors are not known."""


def content_hash(location: str | Path) -> str:
    """Return a hash of what a folder of weights or settings holds: the same for the same files, wherever it lies.

    Of a file above 64 MiB, the size, the names and shapes of its tensors, and 4 KiB out of each of them count: a
    training changes almost every number of a tensor that it changes at all, and a model of 140 GB is hashed in seconds.
    Raises ConfigError for a folder that is not there.
    """
    folder = Folder.at(location)
    files = list_files(folder)
    if not files:
        raise ConfigError(f"{location}: no such folder, or it is empty")
    return _hash_files(folder.location, tuple((name, folder.stamp(name, info)) for name, info in files.items()))


@lru_cache(maxsize=64)
def _hash_files(location: str, files: tuple[tuple[str, Stamp], ...]) -> str:
    """Return the hash of the files (name, stamp), which is computed once while none changes."""
    folder, digest = Folder.at(location), hashlib.sha256()
    for name, (size, _, _) in files:
        digest.update(f"{name}:{file_hash(folder, name, size)}".encode())
    return digest.hexdigest()


def file_hash(folder: Folder, name: str, size: int) -> str:
    """Return the hash of one file, as `content_hash` counts it."""
    digest = hashlib.sha256(str(size).encode())
    with folder.reached("read", name), folder.fs.open_input_file(folder.file(name)) as file:
        if size <= HASHED_WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        if name.endswith(".safetensors"):
            start = 8 + int.from_bytes(file.read(8), "little")
            header = file.read(start - 8)
            digest.update(header)
            tensors = [entry for key, entry in json.loads(header).items() if key != "__metadata__"]
            middles = [start + sum(tensor["data_offsets"]) // 2 for tensor in tensors]
        else:
            middles = [size * number // NUM_SAMPLES for number in range(NUM_SAMPLES)]
        for middle in sorted(middles):
            digest.update(file.read_at(min(SAMPLE, size), max(0, middle - SAMPLE // 2)))
    return digest.hexdigest()
