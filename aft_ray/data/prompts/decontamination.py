"""Prompts that evaluation sets hold too: found by n words in a row in common.

    known = EvaluationSets.read(["gsm8k_test.jsonl"], ngram=13, seed=0)
    known.overlap("natalia sold clips to ...")     # None, or ("gsm8k_test.jsonl", "gsm8k_test.jsonl:17")

Words are runs of letters and digits after the normalisation of `duplicates.plain_text`, without accents and vowel
signs, which would cut words of Indic scripts apart. Scripts written without spaces between words (Chinese, Japanese,
Thai, Lao, Khmer, Burmese, Tibetan) are compared by character: each counts as one word, so n words are n characters.
An evaluation prompt of fewer than n words is found only where the whole prompt is the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

from aft_ray.data.prompts.duplicates import plain_text
from aft_ray.data.prompts.rows import conversation
from aft_ray.data.prompts.sources import read_source
from aft_ray.errors import InputError

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u0fff"  # Tibetan
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # Hiragana, Katakana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words of a text that `plain_text` made: `naïve 2nd, 中文` -> `[naive, 2nd, 中, 文]`."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(character for character in decomposed if not unicodedata.category(character).startswith("M"))
    return _WORD.findall(text)


class EvaluationSets:
    """The n-grams of evaluation prompts, as hashes."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self._places: list[tuple[str, str]] = []
        """Source and place of every evaluation prompt."""
        self._ngrams: dict[int, int] = {}
        """Hash of an n-gram -> number of the first prompt it stands in."""
        self._whole: dict[str, int] = {}
        """The same for the whole of prompts with fewer than n words."""

    @classmethod
    def read(cls, sources: Iterable[str], ngram: int, seed: int) -> EvaluationSets:
        """Read every set once. The prompt is found as in any source; answers and other columns are not looked at."""
        sets = cls(ngram)
        for source in sources:
            num_before = len(sets._places)
            for place, raw in read_source(source, None, seed, "prompts.decontaminate"):
                _, messages = conversation(raw, None, place, hint="Rename the column that holds it")
                sets.add(source, place, plain_text(messages))
            if len(sets._places) == num_before:
                raise InputError(f"prompts.decontaminate {source}: no rows in it; expected an evaluation set")
        return sets

    def add(self, source: str, place: str, text: str) -> None:
        """Know one more evaluation prompt, normalised by `plain_text`."""
        number = len(self._places)
        self._places.append((source, place))
        words = words_of(text)
        if len(words) < self.ngram:
            self._whole.setdefault(_whole(words, text), number)
        for ngram in self._hashes(words):
            self._ngrams.setdefault(ngram, number)

    def overlap(self, text: str) -> tuple[str, str] | None:
        """The evaluation set, and the place in it, of the first evaluation prompt that this one overlaps."""
        words = words_of(text)
        numbers = [self._ngrams[ngram] for ngram in self._hashes(words) if ngram in self._ngrams]
        whole = self._whole.get(_whole(words, text)) if len(words) < self.ngram else None
        numbers += [] if whole is None else [whole]
        return self._places[min(numbers)] if numbers else None

    def _hashes(self, words: list[str]) -> Iterator[int]:
        """Python's own hashes: they live in this process only, and are 64 bits wide."""
        return (hash(" ".join(words[i : i + self.ngram])) for i in range(len(words) - self.ngram + 1))


def _whole(words: list[str], text: str) -> str:
    return " ".join(words) or text  # a prompt of signs only, such as ":-)"
