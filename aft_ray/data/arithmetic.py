"""A task that a model of a million parameters learns in minutes: looking up pairs of numbers in made-up tables.

    question   0702050012130301*1319061104000802     eight two-digit numbers, a sign, eight more
    answer     1603090112011110                      what 07*13, 02*19, 05*06, ... stand for, side by side

There is a table for each sign, and what stands in it was drawn by chance once. So nothing can be calculated: a model
has to have seen a pair to know it, as with names and dates. Small numbers are more frequent than large ones (Zipf's
law, as for words in texts): the model knows some of the 1,200 facts well, many vaguely and some hardly at all.

An answer is right when all eight places are. Drafts that are each wrong in another place hold the right answer between
them: whoever compares them place by place could find it, and a vote over whole answers could not.

Each question belongs to one partition, by a hash of its text, so what is learned in one is never asked in another:
`pretraining` for documents, `tuning` to choose settings on, `final` for the numbers that are reported.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Literal, get_args

Partition = Literal["pretraining", "tuning", "final"]
PARTITIONS: tuple[Partition, ...] = get_args(Partition)

MODULUS = 20
"""Numbers there are: 00 to 19."""
NUM_PLACES = 8
"""Numbers in a list."""
OPERAND_WEIGHTS = [1 / (1 + operand) for operand in range(MODULUS)]
PERCENT_PRETRAINING, PERCENT_TUNING = 90, 5
MAX_PAIRS, REPEAT_RATE = 5, 0.4
"""A document has 1 to 5 question-answer pairs; a pair after the first asks an earlier question again at this rate, as
real corpora quote themselves. Copying from the context is learned from that, and aggregating needs it."""

Pair = tuple[str, str]
"""(question, answer)"""


def answer_to(question: str) -> str:
    """Return what the pairs of all places stand for, side by side."""
    left, sign, right = re.split(r"([-+*])", question)
    return "".join(f"{fact(a, sign, b):02d}" for a, b in zip(_numbers(left), _numbers(right), strict=True))


@cache
def fact(left: int, sign: str, right: int) -> int:
    """Return what stands in the table of `sign` for two numbers."""
    return _hashed(f"{left}{sign}{right}") % MODULUS


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d\d", text)]


def partition_of(question: str) -> Partition:
    """Return the partition of a question, which does not depend on any seed."""
    place = _hashed(question) % 100
    if place < PERCENT_PRETRAINING:
        return "pretraining"
    return "tuning" if place < PERCENT_PRETRAINING + PERCENT_TUNING else "final"


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def questions(partition: Partition, seed: int) -> Iterator[str]:
    """Yield different questions of one partition, without end; the same ones for the same seed."""
    chance, seen = random.Random(f"{partition}/{seed}"), set[str]()
    while True:
        question = _question(chance)
        if partition_of(question) == partition and question not in seen:
            seen.add(question)
            yield question


def documents(seed: int) -> Iterator[list[Pair]]:
    """Yield documents for pretraining, without end."""
    chance, fresh = random.Random(f"documents/{seed}"), questions("pretraining", seed)
    while True:
        pairs: list[Pair] = []
        for _ in range(chance.randint(1, MAX_PAIRS)):
            is_repeat = pairs and chance.random() < REPEAT_RATE
            question = chance.choice(pairs)[0] if is_repeat else next(fresh)
            pairs.append((question, answer_to(question)))
        yield pairs


def _question(chance: random.Random) -> str:
    left, right = (chance.choices(range(MODULUS), OPERAND_WEIGHTS, k=NUM_PLACES) for _ in range(2))
    return "".join(
        [*(f"{number:02d}" for number in left), chance.choice("+-*"), *(f"{number:02d}" for number in right)]
    )
