"""A multi-step task that a model of a million parameters learns in minutes: chains of operations modulo twenty.

    question   07+13*02-19*05+...   eight operations, from left to right, every result modulo twenty
    answer     07,00,00,01,05,...   every running total; the last number is the answer

The documents for pretraining have far more small operands than large ones, so the base model knows some of the 1,200
facts (total, operator, operand) well and is unsure of those it rarely met. The questions ask for all of them equally
often. A draft goes wrong where its fact does, and then every later total is wrong too; an aggregator can join the right
parts of drafts that fail at different places.

Each question belongs to one partition, by a hash of its text, so what is learned in one is never asked in another:
`pretraining` for documents, `tuning` to choose settings on, `final` for the numbers that are reported.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from typing import Literal, get_args

Partition = Literal["pretraining", "tuning", "final"]
PARTITIONS: tuple[Partition, ...] = get_args(Partition)

MODULUS = 20
NUM_TERMS = 9
"""Numbers in a question, which has one operation fewer."""
DOCUMENT_WEIGHTS = [1 / (1 + operand) ** 2 for operand in range(MODULUS)]
"""How often an operand is drawn for the documents: a power law, as for words in texts. All other questions draw every
operand equally often, and so ask for facts that the documents rarely show."""
PERCENT_PRETRAINING, PERCENT_TUNING = 90, 5
MAX_PAIRS, REPEAT_RATE = 5, 0.4
"""A document has 1 to 5 question-answer pairs; a pair after the first asks an earlier question again at this rate, as
real corpora quote themselves. Copying from the context is learned from that, and aggregating needs it."""

Pair = tuple[str, str]
"""(question, answer with its running totals)"""


def worked(question: str) -> str:
    """Return the answer with its running totals.

    >>> worked("07+13*02-19")
    '07,00,00,01'
    """
    first, *steps = re.findall(r"[-+*]?\d\d", question)
    totals = [int(first)]
    for step in steps:
        total, operand = totals[-1], int(step[1:])
        totals.append({"+": total + operand, "-": total - operand, "*": total * operand}[step[0]] % MODULUS)
    return ",".join(f"{total:02d}" for total in totals)


def partition_of(question: str) -> Partition:
    """Return the partition of a question, which does not depend on any seed."""
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) % 100
    if place < PERCENT_PRETRAINING:
        return "pretraining"
    return "tuning" if place < PERCENT_PRETRAINING + PERCENT_TUNING else "final"


def questions(partition: Partition, seed: int) -> Iterator[str]:
    """Yield different questions of one partition, without end; the same ones for the same seed."""
    chance, seen = random.Random(f"{partition}/{seed}"), set[str]()
    while True:
        question = _question(chance, DOCUMENT_WEIGHTS if partition == "pretraining" else None)
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
            pairs.append((question, worked(question)))
        yield pairs


def _question(chance: random.Random, weights: list[float] | None) -> str:
    operands = chance.choices(range(MODULUS), weights, k=NUM_TERMS - 1)
    return f"{chance.randrange(MODULUS):02d}" + "".join(f"{chance.choice('+-*')}{operand:02d}" for operand in operands)
