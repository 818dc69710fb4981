"""Finds prompts that overlap an evaluation set: they share n consecutive words with one of its prompts.

    known = EvaluationSets.read(["gsm8k_test.jsonl"], ngram=13, seed=0)
    known.overlap("natalia sold clips to ...")     # None, or ("gsm8k_test.jsonl", "gsm8k_test.jsonl:17")

A word is a run of letters and digits in a text normalised by `duplicates.plain_text`. Accents and vowel signs are
removed first, since vowel signs would split words of Indic scripts. In scripts without spaces between words (Chinese,
Japanese, Thai, Lao, Khmer, Burmese, Tibetan) each character counts as one word. An evaluation prompt of fewer than n
words overlaps only with an identical prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

from aft_ray.data.prompts.duplicates import plain_text
from aft_ray.data.prompts.rows import conversation
from aft_ray.data.prompts.sources import read_source
from aft_ray.errors import InputError
from aft_ray.inference.answers import UNSPACED

_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Return the words of a normalised text: `naïve 2nd, 中文` -> `[naive, 2nd, 中, 文]`."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(character for character in decomposed if not unicodedata.category(character).startswith("M"))
    return _WORD.findall(text)


class EvaluationSets:
    """The n-grams of all evaluation prompts, stored as hashes."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self._places: list[tuple[str, str]] = []
        """Source and place of each evaluation prompt."""
        self._ngrams: dict[int, int] = {}
        """Maps the hash of an n-gram to the number of the first prompt that contains it."""
        self._whole: dict[str, int] = {}
        """Maps the whole text of a prompt with fewer than n words to its number."""

    @classmethod
    def read(cls, sources: Iterable[str], ngram: int, seed: int) -> EvaluationSets:
        """Read the prompts of every set. Answers and other columns are ignored."""
        sets = cls(ngram)
        for source in sources:
            num_before = len(sets._places)
            for place, raw in read_source(source, None, seed, "prompts.decontaminate"):
                messages = conversation(raw, None, place, hint="Rename the column that holds the prompt")
                sets.add(source, place, plain_text(messages))
            if len(sets._places) == num_before:
                raise InputError(f"prompts.decontaminate {source}: the source has no rows; expected an evaluation set")
        return sets

    def add(self, source: str, place: str, text: str) -> None:
        """Add one evaluation prompt, normalised by `plain_text`."""
        number = len(self._places)
        self._places.append((source, place))
        words = words_of(text)
        if len(words) < self.ngram:
            self._whole.setdefault(_whole(words, text), number)
        for ngram in self._hashes(words):
            self._ngrams.setdefault(ngram, number)

    def overlap(self, text: str) -> tuple[str, str] | None:
        """Return the evaluation set and the place of the first evaluation prompt that this text overlaps, or None."""
        words = words_of(text)
        numbers = [self._ngrams[ngram] for ngram in self._hashes(words) if ngram in self._ngrams]
        whole = self._whole.get(_whole(words, text)) if len(words) < self.ngram else None
        numbers += [] if whole is None else [whole]
        return self._places[min(numbers)] if numbers else None

    def _hashes(self, words: list[str]) -> Iterator[int]:
        """Yield the hashes of the n-grams. Python's own 64-bit hashes suffice, since they never leave this process."""
        return (hash(" ".join(words[i : i + self.ngram])) for i in range(len(words) - self.ngram + 1))


def _whole(words: list[str], text: str) -> str:
    return " ".join(words) or text  # a prompt without any word, such as ":-)"
