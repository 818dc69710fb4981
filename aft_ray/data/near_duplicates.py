"""Prompts that say almost the same: MinHash over character 5-grams, through `datasketch`.

    near = NearDuplicates(threshold=0.8, seed=0)
    near.earlier("p-1", "Name three rivers in Europe.")     # None, and remembered
    near.earlier("p-2", "Name three rivers in  EUROPE!")    # "p-1"

Characters, so no language needs its words told apart. Costs about 6 KiB of memory per prompt that is kept, and 0.2 ms.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from collections.abc import Iterable
from typing import Any

from aft_ray.records import Message

NUM_PERM = 128
"""Standard error of an estimated similarity: at most 0.5 / sqrt(128) = 0.044."""
SHINGLE = 5
CANDIDATES_FROM = 0.9
"""Pairs this far below the threshold become candidates too: the index is approximate, every candidate is checked."""
SHINGLES_AT_ONCE = 10_000
"""Hashed together; a megabyte of text at once would take half a gigabyte."""


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
        self._index = MinHashLSH(
            threshold=threshold * CANDIDATES_FROM, num_perm=NUM_PERM, weights=(0.1, 0.9), hashfunc=_short
        )
        self._kept: list[tuple[str, Any]] = []

    def earlier(self, prompt_id: str, text: str) -> str | None:
        """The id of the most similar prompt kept before, the earliest of equals; None when this one is kept."""
        from datasketch import LeanMinHash

        sketch = self._new.copy()
        parts = [part.encode(errors="replace") for part in shingles(text)]
        for start in range(0, len(parts), SHINGLES_AT_ONCE):
            sketch.update_batch(parts[start : start + SHINGLES_AT_ONCE])
        candidates = ((sketch.jaccard(self._kept[n][1]), -n) for n in self._index.query(sketch))
        similarity, minus_n = max(candidates, default=(-1.0, 0))
        if similarity >= self.threshold:
            return self._kept[-minus_n][0]
        self._index.insert(len(self._kept), sketch)
        self._kept.append((prompt_id, LeanMinHash(sketch)))
        return None


def _short(band: bytes) -> bytes:
    return hashlib.blake2b(band, digest_size=8).digest()
