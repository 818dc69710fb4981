"""Decides the outcome of every row of the source: it is kept, it failed, or it is removed.

    read_prompts(config)    yields the rows that are kept
    Sifter(config).sift()   yields every row of the source with its outcome

A row that cannot be used either fails alone or ends the run (`prompts.on_bad_row`). Other rows are removed, by these
checks in this order: they repeat a conversation (`prompts.duplicates`), overlap an evaluation set
(`prompts.decontaminate`), or nearly repeat an earlier prompt (`prompts.near_duplicates`). Of several similar prompts,
the first one in the source is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts.decontamination import EvaluationSets
from aft_ray.data.prompts.duplicates import GroupedAnswers, NearDuplicates, PromptsOfRun, SeenPrompts, plain_text
from aft_ray.data.prompts.files import Placed
from aft_ray.data.prompts.responses import merged
from aft_ray.data.prompts.rows import Prompt, to_prompt
from aft_ray.data.prompts.sources import read_source
from aft_ray.errors import ConfigError, InputError, ResumeRefused
from aft_ray.records import fingerprint, prompt_id_of

DUPLICATE, GROUPED, NEAR_DUPLICATE, OVERLAPS = "duplicate", "grouped", "near duplicate", "overlaps"
IN_THE_RUN = "the prompts of this run"
"""The place of the prompts that a run has already."""


@dataclass(frozen=True, kw_only=True)
class Sifted:
    """One row of the source and its outcome: kept, failed (`error`) or removed (`reason`)."""

    place: str
    row: dict[str, Any] = field(default_factory=dict)
    """A row of `records.PROMPTS` without its split; empty if the row failed."""
    error: Exception | None = None
    reason: str | None = None
    """`duplicate`, `grouped` (with an earlier row), `near duplicate`, or `overlaps <evaluation set>`."""
    resembles: str | None = None
    """The id of the earlier prompt, or the place in the evaluation set, that this prompt resembles."""
    is_in_run: bool = False
    """Whether the run has this prompt already."""

    @property
    def is_kept(self) -> bool:
        return self.error is None and self.reason is None


def read_prompts(config: PromptsConfig, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the kept prompts among the first `config.limit` rows of `config.source`, in the source's order.

    `seed` draws the items of procedural sources. Raises InputError, which names the place, for a bad source, and
    ConfigError if a package is missing.
    """
    sifter = Sifter(config, seed)
    if config.duplicates != "group":
        yield from (sifted.row for sifted in sifter.sift() if sifted.is_kept)
        return
    kept = [sifted.is_kept for sifted in sifter.sift()]
    for is_kept, (place, raw) in zip(kept, raw_rows(config, seed), strict=True):
        if is_kept:
            yield sifter.with_group(to_prompt(raw, config, place).row)


def raw_rows(config: PromptsConfig, seed: int) -> Iterator[Placed]:
    """Yield the rows of `config.source` as the source holds them; the same ones each time."""
    return read_source(config.source, config.limit, seed)


class Sifter:
    """Decides about the rows of one source, in constant memory."""

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.seen, self.of_run, self.groups = SeenPrompts(), PromptsOfRun(), GroupedAnswers()
        self.evaluation, self.near = None, None
        if config.decontaminate:
            self.evaluation = EvaluationSets.read(config.decontaminate, config.decontaminate_ngram, seed)
        if config.near_duplicates is not None:
            self.near = NearDuplicates(config.near_duplicates, seed)

    def know(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take the prompts that the run has already: they stay, and other rows are compared with them."""
        for row in rows:
            self.of_run.add(row["prompt_id"], self._digest(row))
            self.seen.add(prompt_id_of(row["messages"]), row["prompt_id"], IN_THE_RUN)
            if self.near:
                self.near.earlier(row["prompt_id"], plain_text(row["messages"]))

    def sift(self) -> Iterator[Sifted]:
        """Yield every row of the source with its outcome, in the source's order."""
        place = None
        for place, raw in raw_rows(self.config, self.seed):
            try:
                prompt = to_prompt(raw, self.config, place)
                yield self._decided(prompt, place)
            except ConfigError:
                raise
            except (ValueError, RecursionError) as error:  # the row fails, with its place and the reason
                if self.config.on_bad_row == "stop":
                    raise
                yield Sifted(place=place, error=error)
        if place is None:
            raise InputError(
                f"prompts.source {self.config.source}: the source has no rows; expected at least one prompt"
            )

    def with_group(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a kept row with the answers of all rows that repeat its conversation."""
        if self.config.duplicates != "group":
            return row
        return {**row, "responses": merged(self.groups.of(prompt_id_of(row["messages"])))}

    def check_run(self, rows: Iterable[dict[str, Any]]) -> None:
        """Raise ResumeRefused if the source, read to its end, lacks prompts of the run or has other answers to them."""
        missing = self.of_run.missing()
        if missing:
            raise ResumeRefused(
                f"prompts.source {self.config.source}: {len(missing)} prompts of this run are not in it any more, such "
                f"as {', '.join(missing[:3])}. Choose another run.dir for other prompts"
            )
        if self.config.duplicates == "group":
            for row in rows:
                if self.with_group(row)["responses"] != row["responses"]:
                    raise ResumeRefused(self._changed(row["prompt_id"], "the answers to"))

    def _decided(self, prompt: Prompt, place: str) -> Sifted:
        row, config = prompt.row, self.config
        if config.duplicates == "group":
            self.groups.add(prompt.content_id, row["responses"] or [])
        if (digest := self.of_run.find(row["prompt_id"])) is not None:
            if digest != self._digest(row):
                raise ResumeRefused(self._changed(row["prompt_id"], place))
            return Sifted(place=place, row=row, is_in_run=True)
        first = self.seen.conversation(prompt.content_id)
        if first is not None and config.duplicates in {"drop", "group"}:
            reason = DUPLICATE if config.duplicates == "drop" else GROUPED
            return Sifted(place=place, row=row, reason=reason, resembles=first.prompt_id)
        if first is not None and not (config.duplicates == "keep" and prompt.has_given_id):
            raise InputError(
                f"{place}: the same conversation as at {first.place}, whose prompt_id is {first.prompt_id}. Remove one "
                "of them, or set prompts.duplicates: drop, group (their answers) or keep (rows with ids of their own)"
            )
        taken = self.seen.add(prompt.content_id, row["prompt_id"], place)
        if taken is not None:
            raise InputError(
                f"{place}: prompt_id {row['prompt_id']!r} is already used at {taken.place}; ids must be unique"
            )
        text = plain_text(row["messages"]) if self.evaluation or self.near else ""
        if self.evaluation and (overlap := self.evaluation.overlap(text)):
            return Sifted(place=place, row=row, reason=f"{OVERLAPS} {overlap[0]}", resembles=overlap[1])
        if self.near and (earlier := self.near.earlier(row["prompt_id"], text)):
            return Sifted(place=place, row=row, reason=NEAR_DUPLICATE, resembles=earlier)
        return Sifted(place=place, row=row)

    def _digest(self, row: dict[str, Any]) -> str:
        """Return a digest of a prompt without its split, and without its answers where those of others join."""
        left_out = {"split", "responses"} if self.config.duplicates == "group" else {"split"}
        return fingerprint({key: value for key, value in row.items() if key not in left_out})[:16]

    def _changed(self, prompt_id: str, what: str) -> str:
        return (
            f"prompts.source {self.config.source}: {what}: prompt {prompt_id} of this run has changed. More prompts "
            "may be added to a run, but its own must stay; choose another run.dir for changed ones"
        )
