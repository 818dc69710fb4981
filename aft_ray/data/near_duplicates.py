"""Prompts that say almost the same: MinHash over character 5-grams (`datasketch`), found again through SQLite.

    near = NearDuplicates(threshold=0.8, seed=0)
    near.earlier("p-1", "Name three rivers in Europe.")     # None, and remembered
    near.earlier("p-2", "Name three rivers in  EUROPE!")    # "p-1"

Characters, so no language needs its words told apart. What is remembered of the prompts stands in a temporary file of
SQLite's own, about 1 KB for each that is kept, so memory does not grow with their number. The file lies in
SQLITE_TMPDIR, else TMPDIR, else /var/tmp; it has no name there and is gone with the process, however that ends.
"""

from __future__ import annotations

import hashlib
import sqlite3
import unicodedata
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from aft_ray.errors import ConfigError
from aft_ray.records import Message

Sketch = npt.NDArray[np.uint32]
NUM_PERM = 128
"""Standard error of an estimated similarity: at most 0.5 / sqrt(128) = 0.044."""
SHINGLE = 5
CANDIDATES_FROM = 0.9
"""Pairs this far below the threshold become candidates too: the index is approximate, every candidate is checked."""
SHINGLES_AT_ONCE = 10_000
"""Hashed together; a megabyte of text at once would take half a gigabyte."""
SCHEMA = """
PRAGMA cache_size = -16384;  -- KiB: what it keeps in memory; the operating system caches the file
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE prompts (number INTEGER PRIMARY KEY, prompt_id TEXT, sketch BLOB);
CREATE TABLE bands (key INTEGER, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID;
BEGIN;
"""
CANDIDATES = """
SELECT number, prompt_id, sketch FROM prompts
WHERE number IN (SELECT number FROM bands WHERE key IN ({}))
"""


def plain_text(messages: Iterable[Message]) -> str:
    """What the user says, fit for comparing: all user turns, NFKC, case folded, runs of whitespace as one space."""
    text = " ".join(message["content"] for message in messages if message["role"] == "user")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> list[str]:
    """The distinct runs of five characters; a shorter text is one of its own."""
    return sorted({text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))})


class NearDuplicates:
    """The prompts kept so far, found again by similarity."""

    def __init__(self, threshold: float, seed: int) -> None:
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        self._new = MinHash(num_perm=NUM_PERM, seed=seed % 2**32, hashfunc=zlib.crc32)
        best = MinHashLSH(threshold=threshold * CANDIDATES_FROM, num_perm=NUM_PERM, weights=(0.1, 0.9))
        self._num_bands, self._band_size = best.b, best.r
        self._num_kept = 0
        self._index = sqlite3.connect("", isolation_level=None)  # an empty name: a temporary file
        self._index.executescript(SCHEMA)

    def earlier(self, prompt_id: str, text: str) -> str | None:
        """The id of the most similar prompt kept before, the earliest of equals; None when this one is kept."""
        sketch = self._sketch(text)
        bands = [self._key(sketch, band) for band in range(self._num_bands)]
        candidates = (
            (int(np.count_nonzero(np.frombuffer(other, np.uint32) == sketch)), -number, name)
            for number, name, other in self._index.execute(CANDIDATES.format(", ".join("?" * len(bands))), bands)
        )
        num_equal, _, name = max(candidates, default=(-1, 0, ""))
        if num_equal >= self.threshold * NUM_PERM:
            return name
        try:
            self._keep(prompt_id, sketch, bands)
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"prompts.near_duplicates: the index of {self._num_kept} prompts cannot grow ({error}). It needs about "
                "1 KB of disk per prompt: name a folder with room in SQLITE_TMPDIR"
            ) from None
        return None

    def _keep(self, prompt_id: str, sketch: Sketch, bands: Sequence[int]) -> None:
        self._index.execute("INSERT INTO prompts VALUES (?, ?, ?)", (self._num_kept, prompt_id, sketch.tobytes()))
        self._index.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", [(key, self._num_kept) for key in bands])
        self._num_kept += 1

    def _sketch(self, text: str) -> Sketch:
        """The NUM_PERM smallest hashes: the share of equal ones in two sketches estimates the similarity."""
        minhash = self._new.copy()
        parts = [part.encode(errors="replace") for part in shingles(text)]
        for start in range(0, len(parts), SHINGLES_AT_ONCE):
            minhash.update_batch(parts[start : start + SHINGLES_AT_ONCE])
        return minhash.hashvalues.astype(np.uint32)  # datasketch's hashes have 32 bits

    def _key(self, sketch: Sketch, band: int) -> int:
        """A band's number and its hashes, as the signed 64 bits that SQLite stores."""
        part = sketch[band * self._band_size : (band + 1) * self._band_size]
        digest = hashlib.blake2b(part.tobytes(), digest_size=8, salt=band.to_bytes(2, "big")).digest()
        return int.from_bytes(digest, "big", signed=True)
