"""Prompts: any source (`aft_ray.data.sources`) -> rows with the columns of `records.PROMPTS`, less what is left out.

    read_prompts(config)    the rows
    sift(config)            every row of the source with what became of it

A row that cannot be used ends the reading at once, with file and line, or is handed on as failed
(`prompts.on_bad_row`). Left out are, in this order: repeated conversations (`prompts.duplicates`), prompts that overlap
an evaluation set (`prompts.decontaminate`), and those much like an earlier one (`prompts.near_duplicates`). Of prompts
that are alike the first in the source's order stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aft_ray.config import PromptsConfig
from aft_ray.data.decontamination import EvaluationSets
from aft_ray.data.hash_set import HashSet, hash_of
from aft_ray.data.near_duplicates import NearDuplicates, plain_text
from aft_ray.data.prompt_rows import to_prompt
from aft_ray.data.sources import Placed, read_source
from aft_ray.errors import InputError

DUPLICATE, NEAR_DUPLICATE, OVERLAPS = "duplicate", "near duplicate", "overlaps"


@dataclass(frozen=True, kw_only=True)
class Sifted:
    """One row of the source and what became of it: kept, failed (`error`) or left out (`reason`)."""

    place: str
    row: dict[str, Any] = field(default_factory=dict)
    """A row of `records.PROMPTS` without its split; empty where it failed."""
    error: Exception | None = None
    reason: str | None = None
    """`duplicate`, `near duplicate`, or `overlaps <evaluation set>`."""
    resembles: str | None = None
    """The id of the prompt it is like, or the place in the evaluation set."""

    @property
    def is_kept(self) -> bool:
        return self.error is None and self.reason is None


def read_prompts(config: PromptsConfig, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The prompts of the first `config.limit` rows of `config.source` that are kept, in the source's order.

    Raises InputError that names the place, what was found and what to do, ConfigError where a package is missing.
    `seed` draws the items of procedural sources.
    """
    return (sifted.row for sifted in sift(config, seed) if sifted.is_kept)


def sift(config: PromptsConfig, seed: int) -> Iterator[Sifted]:
    """Every row of the source, in its order, with what became of it. Remembers 12 to 24 bytes of each."""
    seen = HashSet()
    evaluation, near = None, None
    if config.decontaminate:
        evaluation = EvaluationSets.read(config.decontaminate, config.decontaminate_ngram, seed)
    if config.near_duplicates is not None:
        near = NearDuplicates(config.near_duplicates, seed)
    place = None
    for place, raw in raw_rows(config, seed):
        try:
            row, has_own_id = to_prompt(raw, config, place)
            is_repeated = _is_repeated(row["prompt_id"], has_own_id, seen, place, config, seed)
        except (
            InputError,
            ValueError,
            RecursionError,
        ) as error:  # a failed row is data: it keeps its place and a reason
            if config.on_bad_row == "refuse":
                raise
            yield Sifted(place=place, error=error)
            continue
        if is_repeated:
            yield Sifted(place=place, row=row, reason=DUPLICATE, resembles=row["prompt_id"])
            continue
        text = plain_text(row["messages"]) if evaluation or near else ""
        if evaluation and (overlap := evaluation.overlap(text)):
            yield Sifted(place=place, row=row, reason=f"{OVERLAPS} {overlap[0]}", resembles=overlap[1])
        elif near and (earlier := near.earlier(row["prompt_id"], text)):
            yield Sifted(place=place, row=row, reason=NEAR_DUPLICATE, resembles=earlier)
        else:
            yield Sifted(place=place, row=row)
    if place is None:
        raise InputError(f"prompts.source {config.source}: no rows in it; expected one prompt or more")


def raw_rows(config: PromptsConfig, seed: int) -> Iterator[Placed]:
    """The rows of `config.source` as the source gives them; the same ones each time."""
    return read_source(config.source, config.limit, seed)


def _is_repeated(prompt_id: str, has_own_id: bool, seen: HashSet, place: str, config: PromptsConfig, seed: int) -> bool:
    """Whether the conversation was seen before, where that is allowed. Ids that the source gives must be unique."""
    key = hash_of(prompt_id)
    own, derived = key | 1, key & ~1  # the lowest bit tells whose id it was
    if own in seen or (derived in seen and has_own_id):
        raise InputError(
            f"{place}: prompt_id {prompt_id!r} is already used at {_first_place(prompt_id, config, seed)}; ids must be "
            "unique"
        )
    if derived in seen and config.duplicates == "refuse":
        raise InputError(
            f"{place}: the same conversation as at {_first_place(prompt_id, config, seed)} (both get prompt_id "
            f"{prompt_id}). Remove one of them, give each row a prompt_id of its own, or set prompts.duplicates to drop"
        )
    is_repeated = derived in seen
    seen.add(own if has_own_id else derived)
    return is_repeated


def _first_place(prompt_id: str, config: PromptsConfig, seed: int) -> str:
    """Where a prompt_id was first used: found by reading again, which is worth it only when the run ends here."""
    if config.on_bad_row == "refuse":
        for place, raw in raw_rows(config, seed):
            if to_prompt(raw, config, place)[0]["prompt_id"] == prompt_id:
                return place
    return "an earlier row"
