"""Decides the outcome of every row of the source: it is kept, it failed, or it is removed.

    read_prompts(config)    yields the rows that are kept
    sift(config)            yields every row of the source with its outcome

A row that cannot be used either fails alone or ends the run (`prompts.on_bad_row`). Other rows are removed, by these
checks in this order: they repeat a conversation (`prompts.duplicates`), overlap an evaluation set
(`prompts.decontaminate`), or nearly repeat an earlier prompt (`prompts.near_duplicates`). Of several similar prompts,
the first one in the source is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts.decontamination import EvaluationSets
from aft_ray.data.prompts.duplicates import NearDuplicates, SeenPrompts, plain_text
from aft_ray.data.prompts.rows import to_prompt
from aft_ray.data.prompts.sources import Placed, read_source
from aft_ray.errors import ConfigError, InputError

DUPLICATE, NEAR_DUPLICATE, OVERLAPS = "duplicate", "near duplicate", "overlaps"


@dataclass(frozen=True, kw_only=True)
class Sifted:
    """One row of the source and its outcome: kept, failed (`error`) or removed (`reason`)."""

    place: str
    row: dict[str, Any] = field(default_factory=dict)
    """A row of `records.PROMPTS` without its split; empty if the row failed."""
    error: Exception | None = None
    reason: str | None = None
    """`duplicate`, `near duplicate`, or `overlaps <evaluation set>`."""
    resembles: str | None = None
    """The id of the earlier prompt, or the place in the evaluation set, that this prompt resembles."""

    @property
    def is_kept(self) -> bool:
        return self.error is None and self.reason is None


def read_prompts(config: PromptsConfig, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the kept prompts among the first `config.limit` rows of `config.source`, in the source's order.

    `seed` draws the items of procedural sources. Raises InputError, which names the place, for a bad source, and
    ConfigError if a package is missing.
    """
    return (sifted.row for sifted in sift(config, seed) if sifted.is_kept)


def sift(config: PromptsConfig, seed: int) -> Iterator[Sifted]:
    """Yield every row of the source with its outcome, in the source's order, in constant memory."""
    seen = SeenPrompts()
    evaluation, near = None, None
    if config.decontaminate:
        evaluation = EvaluationSets.read(config.decontaminate, config.decontaminate_ngram, seed)
    if config.near_duplicates is not None:
        near = NearDuplicates(config.near_duplicates, seed)
    place = None
    for place, raw in raw_rows(config, seed):
        try:
            row, has_given_id = to_prompt(raw, config, place)
            is_repeated = _is_repeated(row["prompt_id"], has_given_id, seen, place, config)
        except ConfigError:
            raise
        except (ValueError, RecursionError) as error:  # the row fails, with its place and the reason
            if config.on_bad_row == "stop":
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
        raise InputError(f"prompts.source {config.source}: the source has no rows; expected at least one prompt")


def raw_rows(config: PromptsConfig, seed: int) -> Iterator[Placed]:
    """Yield the rows of `config.source` as the source holds them; the same ones each time."""
    return read_source(config.source, config.limit, seed)


def _is_repeated(prompt_id: str, has_given_id: bool, seen: SeenPrompts, place: str, config: PromptsConfig) -> bool:
    """Return whether the row repeats a conversation that may be dropped. An id given by the source must be unique."""
    first = seen.add(prompt_id, place, has_given_id)
    if first is None:
        return False
    if has_given_id or first.has_given_id:
        raise InputError(f"{place}: prompt_id {prompt_id!r} is already used at {first.place}; ids must be unique")
    if config.duplicates == "reject":
        raise InputError(
            f"{place}: the same conversation as at {first.place} (both get prompt_id {prompt_id}). Remove one of them, "
            "give each row its own prompt_id, or set prompts.duplicates to drop"
        )
    return True
