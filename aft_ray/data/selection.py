"""scores -> selection: chooses the K proposals of each prompt, the order to show them in, and the prompts to keep.

in    + proposals with score
out   + selected: indices into proposals, in the order shown; selection_reason
on    CPU

    top_k        the K best scores
    random       a random draw
    stratified   K ranks spread evenly from best to worst: ranks 1, 3, 6, 8 of eight for K = 4
    diverse      maximal marginal relevance: high scores, and dissimilar to the proposals already selected

`easy_per_hard` also removes easy prompts: before the workers start, one pass over the scores counts easy and hard
prompts, and turns the ratio into a threshold on a seeded hash of the prompt id.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from aft_ray.config import SelectionConfig
from aft_ray.data.similarity import similarity
from aft_ray.errors import InputError
from aft_ray.records import HELD_OUT, SELECTION, derive_seed
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.storage import Folder

logger = logging.getLogger(__name__)

# ── which proposals ──────────────────────────────────────────────────────────────────────────────────────────────────


def select(
    proposals: Sequence[Mapping[str, Any]], config: SelectionConfig, draw: random.Random
) -> tuple[list[int], str]:
    """Return the indices of the selected proposals, in the order to show them, and the reason for the choice.

    Ties are broken at random. Proposals without a score come last, in random order (`diverse` ranks them lowest).
    Failed and empty proposals are never selected. If fewer than K are usable, all of them are, and the reason says so.

    >>> select([{"text": "a", "error": None, "score": 0.0}, {"text": "b", "error": None, "score": 1.0}],
    ...        SelectionConfig(num_proposals=1), random.Random(0))
    ([1], 'top_k')
    """
    usable = [i for i, proposal in enumerate(proposals) if proposal["text"] and not proposal["error"]]
    if not usable:
        raise InputError("no usable proposals: all of them failed or are empty")
    draw.shuffle(usable)  # all steps below are stable, so equal scores stay in this random order
    scored = [i for i in usable if proposals[i]["score"] is not None]
    scored.sort(key=lambda i: -proposals[i]["score"])
    unscored = [i for i in usable if proposals[i]["score"] is None]
    size = config.num_proposals
    reason: str = config.strategy
    match config.strategy:
        case "random":
            kept = usable[:size]
        case "top_k":
            kept = [*scored, *unscored][:size]
        case "stratified":
            kept = [*spread(scored, size), *unscored][:size]
            reason = f"stratified over {len(scored)} scored"
        case "diverse":
            kept = most_diverse([*scored, *unscored], proposals, size, config.diversity)
    if not scored and config.strategy in {"top_k", "stratified"}:
        reason = "random: no scores"
    elif not scored and config.strategy == "diverse":
        reason = "diverse: no scores"
    if len(kept) < size:
        reason += f", {len(kept)} of {size} usable"
    if config.shuffle:
        draw.shuffle(kept)
    else:
        kept.sort()
    return kept, reason


def spread(ranked: Sequence[int], num: int) -> list[int]:
    """Return `num` items of `ranked` at even distances, including the first and the last (for one item: the middle).

    >>> spread([10, 11, 12, 13, 14, 15, 16, 17], 4), spread([10, 11, 12], 1)
    ([10, 12, 15, 17], [11])
    """
    if len(ranked) <= num:
        return list(ranked)
    last = len(ranked) - 1
    places = [round(i * last / (num - 1)) for i in range(num)] if num > 1 else [round(last / 2)]
    return [ranked[place] for place in places]


def most_diverse(
    ranked: Sequence[int], proposals: Sequence[Mapping[str, Any]], num: int, diversity: float
) -> list[int]:
    """Select by maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998); return them in the order of choice.

    Each step takes the proposal with the largest `(1 - diversity) x score - diversity x similarity`, where similarity
    is the largest one to a proposal already selected. Scores are normalised to 0..1 within the prompt (1 if all are
    equal), and a missing score counts as 0. The first of `ranked` wins a tie.
    """
    relevance = _normalised({i: proposals[i]["score"] for i in ranked})
    nearest = dict.fromkeys(ranked, 0.0)
    kept: list[int] = []
    while nearest and len(kept) < num:
        best = max(nearest, key=lambda i: (1 - diversity) * relevance[i] - diversity * nearest[i])
        del nearest[best]
        kept.append(best)
        for i in nearest:
            nearest[i] = max(nearest[i], similarity(proposals[i]["text"], proposals[best]["text"]))
    return kept


def _normalised(scores: Mapping[int, float | None]) -> dict[int, float]:
    known = [score for score in scores.values() if score is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def one(score: float | None) -> float:
        if score is None:
            return 0.0
        return (score - low) / (high - low) if high > low else 1.0

    return {i: one(score) for i, score in scores.items()}


# ── which prompts ────────────────────────────────────────────────────────────────────────────────────────────────────


def is_easy(scores: Sequence[float | None]) -> bool | None:
    """Return whether at least half of the scored proposals are correct (score 1.0), or None if no proposal has a score.

    AggLM (arXiv 2509.06870) calls a prompt hard if the majority *answer* is wrong. Answers to open tasks cannot be
    grouped, so we look at the majority of the *proposals* instead.
    """
    known = [score for score in scores if score is not None]
    if not known:
        return None
    return 2 * sum(score < 1.0 for score in known) <= len(known)


def easy_below(scores: Folder, easy_per_hard: float, seed: int) -> int:
    """Return the threshold that keeps `easy_per_hard` easy prompts per hard prompt: those whose hash is below it.

    Reads three columns of the finished scores, shard by shard, and holds 8 bytes per easy prompt.
    """
    num_hard, hashes = 0, [np.empty(0, np.uint64)]
    for prompt_ids, values in _train_scores(scores):
        easy = [is_easy(of_prompt) for of_prompt in values]
        num_hard += easy.count(False)
        drawn = [prompt_hash(name, seed) for name, one in zip(prompt_ids, easy, strict=True) if one]
        hashes.append(np.array(drawn, np.uint64))
    every = np.concatenate(hashes)
    num_kept = min(len(every), round(easy_per_hard * num_hard))
    logger.info("selection: %d hard prompts, %d of %d easy ones kept", num_hard, num_kept, len(every))
    return 1 << 64 if num_kept == len(every) else int(np.partition(every, num_kept)[num_kept])


def _train_scores(scores: Folder) -> Iterator[tuple[list[str], list[list[float | None]]]]:
    """Yield the ids and the scores of the training prompts, shard by shard."""
    columns = ["prompt_id", "split", "proposals.list.element.score"]
    for name in scores.names(".parquet"):
        with scores.fs.open_input_file(scores.file(name)) as file:
            table = pq.ParquetFile(file).read(columns)
        rows = [row for row in table.to_pylist() if row["split"] != HELD_OUT]
        yield [row["prompt_id"] for row in rows], [[p["score"] for p in row["proposals"]] for row in rows]


def prompt_hash(prompt_id: str, seed: int) -> int:
    """Return a seeded hash of the prompt id, below 2**64: the same in every shard order and on every machine."""
    digest = hashlib.blake2b(f"easy/{seed}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


class SelectionWorker(RowWorker):
    """Selects the proposals of a row, and removes easy prompts whose hash is not below the threshold."""

    def __init__(self, config: SelectionConfig, seed: int, easy_below: int | None = None) -> None:
        self.config, self.seed, self.easy_below = config, seed, easy_below

    async def process(self, row: dict[str, Any]) -> Processed:
        if self._is_left_out(row):
            return Processed(rows=[], filtered="easy prompt")
        draw = random.Random(derive_seed(self.seed, row["prompt_id"], 0, -1))
        selected, reason = select(row["proposals"], self.config, draw)
        return Processed(rows=[{**row, "selected": selected, "selection_reason": reason}])

    def _is_left_out(self, row: Mapping[str, Any]) -> bool:
        if self.easy_below is None or row["split"] == HELD_OUT:
            return False
        easy = is_easy([proposal["score"] for proposal in row["proposals"]])
        return bool(easy) and prompt_hash(row["prompt_id"], self.seed) >= self.easy_below


def selected_texts(row: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row's selected proposals, in the order to show them."""
    return [row["proposals"][index]["text"] for index in row["selected"]]


def _worker(run: Run) -> Callable[[], RowWorker]:
    config, seed = run.config.selection, run.config.run.seed
    scored = run.manifest("scores")
    if config.easy_per_hard is None or scored is None or scored.status != "done":
        return partial(SelectionWorker, config, seed)  # run_stage refuses to start without finished scores
    return partial(SelectionWorker, config, seed, easy_below(run.folder.child("scores"), config.easy_per_hard, seed))


def stage(run: Run) -> Stage:
    """Return the selection stage of a run."""
    config = run.config.selection
    return Stage(
        name="selection",
        source=run.folder.child("scores"),
        output=run.folder.child("selection"),
        schema=SELECTION,
        settings={"selection": config.model_dump(mode="json", exclude={"placement"}), "seed": run.config.run.seed},
        worker=_worker(run),
        placement=config.placement,
        must_yield=True,
        is_light=True,
    )
