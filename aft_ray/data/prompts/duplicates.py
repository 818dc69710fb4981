"""Finds prompts that an earlier prompt repeats, exactly or nearly.

    seen = SeenPrompts()                                    # exactly: they have the same prompt_id
    seen.add("p-1", "prompts.jsonl:1", has_given_id=False)  # None, and the id is remembered
    seen.add("p-1", "prompts.jsonl:9", has_given_id=False)  # FirstUse(place="prompts.jsonl:1", has_given_id=False)

    near = NearDuplicates(threshold=0.8, seed=0)            # nearly: MinHash over character 5-grams (`datasketch`)
    near.earlier("p-1", "Name three rivers in Europe.")     # None, and the prompt is remembered
    near.earlier("p-2", "Name three rivers in  EUROPE!")    # "p-1"

Near duplicates are compared by characters, so no language needs word segmentation. Both classes keep what they
remember in a temporary SQLite file, about 100 bytes per prompt and 1 KB per prompt, so memory does not grow with the
number of prompts. SQLite puts the file in SQLITE_TMPDIR, else TMPDIR, else /var/tmp; the file has no name there and
disappears with the process, even if the process is killed.
"""

from __future__ import annotations

import hashlib
import sqlite3
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from aft_ray.errors import ConfigError
from aft_ray.records import Message
from aft_ray.templates.control import without_surrogates

Sketch = npt.NDArray[np.uint32]
NUM_PERM = 128
"""Number of hashes per sketch. An estimated similarity has a standard error of at most 0.5 / sqrt(128) = 0.044."""
SHINGLE = 5
CANDIDATES_FROM = 0.9
"""Pairs this far below the threshold become candidates too, since the index is approximate; each is then checked."""
SHINGLES_AT_ONCE = 10_000
"""Number of shingles hashed together; hashing a megabyte of text at once would take half a gigabyte."""
PRAGMAS = """
PRAGMA cache_size = -16384;  -- KiB kept in memory; the operating system caches the file as well
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
"""
SEEN_SCHEMA = """
CREATE TABLE seen (prompt_id TEXT PRIMARY KEY, place TEXT, has_given_id INTEGER) WITHOUT ROWID;
"""
NEAR_SCHEMA = """
CREATE TABLE prompts (number INTEGER PRIMARY KEY, prompt_id TEXT, sketch BLOB);
CREATE TABLE bands (key INTEGER, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;
"""
CANDIDATES = """
SELECT number, prompt_id, sketch FROM prompts
WHERE number IN (SELECT number FROM bands WHERE key IN ({}))
"""


class TemporaryIndex:
    """SQLite tables in a temporary file. Raises ConfigError, which names the setting, when the disk is full."""

    def __init__(self, schema: str, setting: str, bytes_per_prompt: int) -> None:
        self.setting, self.bytes_per_prompt = setting, bytes_per_prompt
        self._database = sqlite3.connect("", isolation_level=None)  # an empty name makes a temporary file
        self._database.executescript(f"{PRAGMAS}{schema}BEGIN;")

    def select(self, query: str, values: Sequence[Any]) -> Iterator[Any]:
        return self._database.execute(query, values)

    def insert(self, table: str, *rows: tuple[Any, ...]) -> int:
        """Insert the rows whose keys are new, and return their number."""
        slots = ", ".join("?" * len(rows[0]))
        try:
            return self._database.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({slots})", rows).rowcount
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"{self.setting}: the temporary index cannot grow ({error}). It needs about {self.bytes_per_prompt:,} "
                "bytes of disk per prompt: set SQLITE_TMPDIR to a folder with enough space"
            ) from None


class FirstUse(NamedTuple):
    """The place where a prompt_id was first used, and whether the source gave the id or we derived it."""

    place: str
    has_given_id: bool


class SeenPrompts:
    """The ids of the prompts read so far."""

    def __init__(self) -> None:
        self._index = TemporaryIndex(SEEN_SCHEMA, "prompts.source", bytes_per_prompt=100)

    def add(self, prompt_id: str, place: str, has_given_id: bool) -> FirstUse | None:
        """Return where `prompt_id` was first used, or None if it is new, and remember it."""
        if self._index.insert("seen", (prompt_id, without_surrogates(place), has_given_id)):
            return None
        row = next(self._index.select("SELECT place, has_given_id FROM seen WHERE prompt_id = ?", [prompt_id]))
        return FirstUse(row[0], bool(row[1]))


def plain_text(messages: Iterable[Message]) -> str:
    """Return all user turns as one text to compare: NFKC-normalised, case-folded, whitespace runs as one space."""
    text = " ".join(message["content"] for message in messages if message["role"] == "user")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> list[str]:
    """Return the distinct runs of five characters, sorted. A shorter text is its own only shingle."""
    return sorted({text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))})


class NearDuplicates:
    """The prompts kept so far, looked up by similarity."""

    def __init__(self, threshold: float, seed: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        self._new = MinHash(num_perm=NUM_PERM, seed=seed % 2**32, hashfunc=zlib.crc32)
        best = MinHashLSH(threshold=threshold * CANDIDATES_FROM, num_perm=NUM_PERM, weights=(0.1, 0.9))
        self._num_bands, self._band_size = best.b, best.r
        self._num_kept = 0
        self._index = TemporaryIndex(NEAR_SCHEMA, "prompts.near_duplicates", bytes_per_prompt=1_000)

    def earlier(self, prompt_id: str, text: str) -> str | None:
        """Return the id of the most similar earlier prompt (the first of equals), or None and remember this prompt."""
        sketch = self._sketch(text)
        bands = [self._key(sketch, band) for band in range(self._num_bands)]
        candidates = (
            (int(np.count_nonzero(np.frombuffer(other, np.uint32) == sketch)), -number, name)
            for number, name, other in self._index.select(CANDIDATES.format(", ".join("?" * len(bands))), bands)
        )
        num_equal, _, name = max(candidates, default=(-1, 0, ""))
        if num_equal >= self.threshold * NUM_PERM:
            return name
        self._index.insert("prompts", (self._num_kept, prompt_id, sketch.tobytes()))
        self._index.insert("bands", *((key, self._num_kept) for key in bands))
        self._num_kept += 1
        return None

    def _sketch(self, text: str) -> Sketch:
        """Return the NUM_PERM smallest hashes: the share of equal ones in two sketches estimates the similarity."""
        minhash = self._new.copy()
        parts = [part.encode(errors="replace") for part in shingles(text)]
        for start in range(0, len(parts), SHINGLES_AT_ONCE):
            minhash.update_batch(parts[start : start + SHINGLES_AT_ONCE])
        return minhash.hashvalues.astype(np.uint32)  # datasketch's hashes have 32 bits

    def _key(self, sketch: Sketch, band: int) -> int:
        """Return a hash of the band's number and values, as the signed 64 bits that SQLite stores."""
        part = sketch[band * self._band_size : (band + 1) * self._band_size]
        digest = hashlib.blake2b(part.tobytes(), digest_size=8, salt=band.to_bytes(2, "big")).digest()
        return int.from_bytes(digest, "big", signed=True)
