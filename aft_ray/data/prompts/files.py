"""Reads the rows of files: JSON lines, JSON, CSV and Parquet, compressed or not, one file, a folder or a glob.

    prompts.jsonl, prompts.jsonl.zst, s3://bucket/prompts.parquet      one file
    data/                                                              every file in it and below it, all of one kind
    data/**/train-*.parquet                                            what the pattern matches

    kind      suffixes                  rows
    lines     .jsonl .ndjson            one JSON object per line; blank lines are skipped
    json      .json                     an array of objects, an object that holds one, or JSON lines
    csv       .csv .tsv                 the first line names the columns; an empty cell is a missing value
    parquet   .parquet                  the rows of all row groups

All but Parquet may end with .gz, .zst or .bz2 as well. Files are read in the order of their paths, and no further than
the caller asks for rows.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from aft_ray.errors import InputError
from aft_ray.records import fingerprint
from aft_ray.storage import HASHED_WHOLE, PARTIAL, Folder

Placed = tuple[str, Any]
"""The place of a raw row (`prompts.jsonl:3`), and the row itself, or the InputError that says why it cannot be read."""

KINDS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SOURCES = (
    f"packaged:constraints, a file ({', '.join(KINDS)}; all but the last with .gz, .zst or .bz2 as well), a folder or "
    "a glob, hub:DATASET[@CONFIG][:SPLIT][#REVISION], reasoning_gym:TASK[,TASK...] or arithmetic:PARTITION"
)
"""What a source may be, for messages."""
GLOB = re.compile(r"[*?\[]")
CHUNK = 2**16
"""Characters of a JSON array that are read at once."""


@dataclass(frozen=True)
class File:
    """One file of a source."""

    fs: pafs.FileSystem
    info: pafs.FileInfo
    shown: str
    """The path as places show it."""

    @property
    def kind(self) -> str:
        return KINDS[self._suffixes[0]]

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(self._suffixes[1])

    @property
    def delimiter(self) -> str:
        return "\t" if self._suffixes[0] == ".tsv" else ","

    @property
    def _suffixes(self) -> tuple[str, str]:
        return suffixes_of(self.info.path)


def suffixes_of(path: str) -> tuple[str, str]:
    """Return the suffix of the kind and of the compression: `a/b.jsonl.zst` -> `(".jsonl", ".zst")`, else empty."""
    name = Path(path.rstrip("/"))
    packed = name.suffix if name.suffix in COMPRESSIONS else ""
    kind = Path(name.stem).suffix if packed else name.suffix
    return (kind if kind in KINDS and not (packed and kind == ".parquet") else "", packed)


def find_files(source: str, name: str) -> list[File]:
    """Return the files of a source, sorted by path. Raises InputError, which begins with `name`, if there are none."""
    fs, path = _locate(source, name)
    try:
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.File:
            if not suffixes_of(path)[0]:
                raise InputError(f"{name}: unknown file suffix; expected {SOURCES}")
            return [File(fs, info, source)]
        is_folder = info.type == pafs.FileType.Directory
        found = _listed(fs, path) if is_folder else _matching(fs, path, source, name)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name}: cannot be opened: {error}") from None
    files = [File(fs, one, _shown(source, path, one.path)) for one in found if suffixes_of(one.path)[0]]
    kinds = sorted({file.kind for file in files})
    if not kinds:
        raise InputError(f"{name}: no file of a known kind there ({path}). Expected {SOURCES}")
    if len(kinds) > 1:
        raise InputError(
            f"{name}: files of several kinds ({', '.join(kinds)}); name one of them: {source}/**/*.parquet"
        )
    return files


def _locate(source: str, name: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in source:
        return pafs.LocalFileSystem(), str(Path(source).expanduser().absolute())
    folder = Folder.at(source)
    return folder.fs, folder.path


def _matching(fs: pafs.FileSystem, path: str, source: str, name: str) -> list[pafs.FileInfo]:
    glob = GLOB.search(path)
    if glob is None:
        raise InputError(f"{name}: no such file: {path}. Expected {SOURCES}")
    pattern = _pattern_of(path)
    base = path[: glob.start()].rpartition("/")[0]
    found = [info for info in _listed(fs, base) if pattern.fullmatch(info.path)]
    if not found:
        raise InputError(f"{name}: no file matches {path}")
    return found


def _listed(fs: pafs.FileSystem, path: str) -> list[pafs.FileInfo]:
    """Return the files below a folder that are neither hidden nor unfinished, sorted by path."""
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == pafs.FileType.File and not info.path.endswith(PARTIAL)]
    below = len(path.rstrip("/")) + 1
    shown = [info for info in files if not any(part[0] in "._" for part in info.path[below:].split("/") if part)]
    return sorted(shown, key=lambda info: info.path)


def _pattern_of(glob: str) -> re.Pattern[str]:
    """Return a regular expression for paths: `**/` is any number of folders, `*` and `?` stay within one name."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob)
    return re.compile("".join(parts.get(t) or (t if GLOB.match(t) and t[-1] == "]" else re.escape(t)) for t in tokens))


def _shown(source: str, path: str, file: str) -> str:
    """Return the path of a file below a folder in the spelling of the source."""
    if file.startswith(f"{path}/") and not GLOB.search(source):
        return f"{source.rstrip('/')}{file[len(path) :]}"
    scheme, separator, _ = source.partition("://")
    return f"{scheme}://{file}" if separator and scheme != "file" else file


def content_of(source: str) -> str | None:
    """Return a hash of what the files of a source hold, wherever they are, or None where they are not.

    Of a file above 64 MiB, and of one on object storage, the size and the time of its last change count.
    """
    try:
        files = find_files(source, source)
    except InputError:
        return None
    return fingerprint([_content_of_file(file) for file in files])


def _content_of_file(file: File) -> str:
    info = file.info
    if not isinstance(file.fs, pafs.LocalFileSystem) or info.size > HASHED_WHOLE:
        return f"{info.size} bytes, {info.mtime_ns}"
    with file.fs.open_input_stream(info.path, compression=None) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_files(source: str, name: str) -> Iterator[Placed]:
    """Yield the rows of every file of a source. Raises InputError, which begins with `name`, for a broken file."""
    for file in find_files(source, name):
        try:
            yield from READERS[file.kind](file)
        except UnicodeDecodeError as error:
            raise InputError(f"{file.shown}: not UTF-8 text ({error.reason}). Save it as UTF-8") from None
        except (pa.ArrowException, OSError, EOFError) as error:
            what = "not a valid Parquet file" if file.kind == "parquet" else "cannot be read"
            raise InputError(f"{file.shown}: {what}: {error}") from None


def _stream(file: File) -> io.BufferedReader:
    stream = file.fs.open_input_file(file.info.path)
    if file.compression is not None:
        stream = pa.CompressedInputStream(stream, file.compression)
    return io.BufferedReader(stream, CHUNK)


def _lines(file: File) -> Iterator[Placed]:
    with _stream(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{file.shown}:{number}", json_line(line, f"{file.shown}:{number}")


def json_line(line: bytes, place: str) -> Any:
    """Return the value of one line of JSON, or the InputError that says why it has none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return InputError(f"{place}: not UTF-8 text (byte {error.start}: {error.reason}). Save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return InputError(
            f"{place}: not valid JSON ({error}); expected one JSON object per line, found {_excerpt(line)}"
        )


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _json(file: File) -> Iterator[Placed]:
    """Yield the rows of a JSON file; it is read whole only if it is one object."""
    with _stream(file) as stream:
        first = stream.readline()
        while first and not first.decode("utf-8-sig", errors="ignore").strip():
            first = stream.readline()
    start = first.decode("utf-8-sig", errors="replace").lstrip()
    if start.startswith("{") and not isinstance(json_line(first, ""), InputError):
        with _stream(file) as stream:
            is_lines = any(line.strip() for line in itertools.islice(stream, 1, 3))
        if is_lines:
            yield from _lines(file)
            return
    with _stream(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        rows = _array(text, file) if start.startswith("[") else iter(_rows_of_object(text.read(), file))
        for number, row in enumerate(rows, start=1):
            yield f"{file.shown}:row {number}", row


def _array(text: io.TextIOBase, file: File) -> Iterator[Any]:
    """Yield the values of a JSON array, reading a little more than the values that are asked for."""
    decoder, buffer, position, size, number = json.JSONDecoder(), text.read(CHUNK).lstrip(), 1, CHUNK, 0
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if buffer[position : position + 1] == "]":
            return
        problem = "it ends within the array"
        try:
            value, end = decoder.raw_decode(buffer, position)
            is_whole = end < len(buffer)  # otherwise a number may go on
        except (ValueError, RecursionError) as error:
            is_whole, problem = False, str(error)
        if is_whole:
            number += 1
            yield value
            position, size = end, CHUNK
            continue
        more = text.read(size)
        if not more:
            raise InputError(f"{file.shown}: not valid JSON after row {number}: {problem}")
        buffer, position, size = buffer[position:] + more, 0, size * 2


def _rows_of_object(text: str, file: File) -> list[Any]:
    """Return the list of objects that an object holds in one of its fields, else the object as the only row."""
    try:
        value = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.shown}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return lists[0] if len(lists) == 1 and not _is_row(value) else [value]


def _is_row(value: dict[str, Any]) -> bool:
    """Whether an object is a conversation rather than a file of rows: its list holds turns."""
    lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return {"role", "from"} & set(lists[0][0]) != set()


def _csv(file: File) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)
    with _stream(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter=file.delimiter, strict=True)
        while True:
            try:
                row: dict[Any, Any] = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                place = f"{file.shown}:{reader.reader.line_num}"
                yield place, InputError(f"{place}: not valid CSV: {error}")
                continue
            place = f"{file.shown}:{reader.line_num}"
            if None in row:
                yield place, InputError(f"{place}: {len(row[None])} cells more than the first line names columns")
            else:
                yield place, {key: value or None for key, value in row.items()}


def _parquet(file: File) -> Iterator[Placed]:
    import pyarrow.parquet as pq

    with file.fs.open_input_file(file.info.path) as stream:
        batches = pq.ParquetFile(stream).iter_batches(batch_size=256)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows, start=1):
            yield f"{file.shown}:row {number}", row


READERS = {"lines": _lines, "json": _json, "csv": _csv, "parquet": _parquet}
