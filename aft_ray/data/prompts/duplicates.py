"""Finds prompts that an earlier prompt repeats, exactly or nearly.

    seen = SeenPrompts()                                    # exactly: they hold the same conversation
    seen.conversation("p-1")                                # None: it is new
    seen.add("p-1", "own id", "prompts.jsonl:1")            # and is remembered, with the id of its row
    seen.conversation("p-1")                                # FirstUse(place="prompts.jsonl:1", prompt_id="own id")

    near = NearDuplicates(threshold=0.8, seed=0)            # nearly: MinHash over character 5-grams (`datasketch`)
    near.earlier("p-1", "Name three rivers in Europe.")     # None, and the prompt is remembered
    near.earlier("p-2", "Name three rivers in  EUROPE!")    # "p-1"

Near duplicates are compared by characters, so no language needs word segmentation. Both classes keep what they
remember in a temporary SQLite file, about 200 bytes per prompt and 1 KB per prompt, so memory does not grow with the
number of prompts. SQLite puts the file in SQLITE_TMPDIR, else TMPDIR, else /var/tmp; the file has no name there and
disappears with the process, even if the process is killed.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
CREATE TABLE ids (prompt_id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID;
CREATE TABLE conversations (content_id TEXT PRIMARY KEY, prompt_id TEXT) WITHOUT ROWID;
"""
RUN_SCHEMA = """
CREATE TABLE prompts_of_run (prompt_id TEXT PRIMARY KEY, digest TEXT) WITHOUT ROWID;
CREATE TABLE met (prompt_id TEXT PRIMARY KEY) WITHOUT ROWID;
"""
GROUP_SCHEMA = """
CREATE TABLE answers (content_id TEXT, number INTEGER, responses TEXT, PRIMARY KEY (content_id, number)) WITHOUT ROWID;
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
    """The place where a conversation or an id was first used, and the prompt_id of that row."""

    place: str
    prompt_id: str


class SeenPrompts:
    """The conversations and the ids of the prompts read so far."""

    def __init__(self) -> None:
        self._index = TemporaryIndex(SEEN_SCHEMA, "prompts.source", bytes_per_prompt=200)

    def conversation(self, content_id: str) -> FirstUse | None:
        """Return where the conversation with this id of its content was first used, or None if it is new."""
        query = "SELECT place, prompt_id FROM conversations JOIN ids USING (prompt_id) WHERE content_id = ?"
        return next((FirstUse(*row) for row in self._index.select(query, [content_id])), None)

    def add(self, content_id: str, prompt_id: str, place: str) -> FirstUse | None:
        """Remember a conversation and the id of its row. Returns the first use of the id if it is taken."""
        if not self._index.insert("ids", (prompt_id, without_surrogates(place))):
            query = "SELECT place, prompt_id FROM ids WHERE prompt_id = ?"
            return FirstUse(*next(self._index.select(query, [prompt_id])))
        self._index.insert("conversations", (content_id, prompt_id))
        return None


class PromptsOfRun:
    """The prompts that a run has already, each with a digest of its content: its source may grow, but not change."""

    def __init__(self) -> None:
        self._index = TemporaryIndex(RUN_SCHEMA, "prompts.source", bytes_per_prompt=100)

    def add(self, prompt_id: str, digest: str) -> None:
        self._index.insert("prompts_of_run", (prompt_id, digest))

    def find(self, prompt_id: str) -> str | None:
        """Return the digest of a prompt, or None if the run has no such prompt or the source had it before."""
        found = self._index.select("SELECT digest FROM prompts_of_run WHERE prompt_id = ?", [prompt_id])
        digest = next((row[0] for row in found), None)
        return digest if digest and self._index.insert("met", (prompt_id,)) else None

    def missing(self) -> list[str]:
        """Return the ids of the prompts that the source did not have."""
        query = "SELECT prompt_id FROM prompts_of_run WHERE prompt_id NOT IN (SELECT prompt_id FROM met)"
        return [row[0] for row in self._index.select(query, [])]


class GroupedAnswers:
    """The answers of all rows that repeat a conversation, in the order of the rows, as JSON."""

    def __init__(self) -> None:
        self._index = TemporaryIndex(GROUP_SCHEMA, "prompts.duplicates group", bytes_per_prompt=1_000)
        self._num_rows = 0

    def add(self, content_id: str, responses: Sequence[Mapping[str, Any]]) -> None:
        self._index.insert("answers", (content_id, self._num_rows, json.dumps(responses)))
        self._num_rows += 1

    def of(self, content_id: str) -> list[dict[str, Any]]:
        """Return the answers to one conversation."""
        rows = self._index.select("SELECT responses FROM answers WHERE content_id = ? ORDER BY number", [content_id])
        return [response for row in rows for response in json.loads(row[0])]


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
