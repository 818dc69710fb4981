"""Writes the data card, training_set/card.md: what is in the data set, where it comes from, what was left out and why.

The card is made from the stage folders, shard by shard, and only numbers are kept, so a large run needs little memory.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aft_ray.data.proposals import data_stages
from aft_ray.data.targets import last_stage
from aft_ray.runs import Run
from aft_ray.storage import Folder

CARD = "card.md"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def card_is_current(run: Run) -> bool:
    """Whether there is a card that says of the run's origin what is right now: a licence may be corrected later."""
    folder = run.folder.child("training_set")
    return folder.exists(CARD) and _origin(run) in folder.read_bytes(CARD).decode()


def write_card(run: Run) -> None:
    """Write `training_set/card.md` of a run whose training set is finished."""
    targets = run.folder.child(last_stage(run.config))
    sections = [
        f"# Training set of {run.config.run.dir.rstrip('/').rpartition('/')[2]}",
        _origin(run),
        "## Stages\n\n" + _stages(run),
        "## Examples\n\n" + _examples(run.folder.child("training_set")),
    ]
    if run.config.makes_targets:
        sections.append("## Proposals and scores\n\n" + _proposals(targets))
        sections.append("## Targets\n\n" + _targets(targets))
    run.folder.child("training_set").write_bytes(CARD, ("\n\n".join(sections) + "\n").encode())


def _origin(run: Run) -> str:
    config = run.config
    facts = {
        "prompts": config.prompts.source,
        **({"description": config.prompts.description} if config.prompts.description else {}),
        "licence of the prompts": config.prompts.license or "not stated (prompts.license)",
        "model to be trained": getattr(config.engine, "model", "scripted"),
    }
    if config.makes_targets:
        teacher = config.targets.engine or config.engine
        is_reference = config.targets.source == "reference"
        facts["teacher"] = "reference answers" if is_reference else getattr(teacher, "model", "scripted")
        facts["scorer"] = config.scores.scorer
        facts["selection"] = f"{config.selection.strategy}, K = {config.selection.num_proposals}"
    else:
        facts["answers"] = f"those of the prompts, {config.training_set.answers} in the loss"
    manifest = run.manifest("training_set")
    if manifest is not None:
        facts["fingerprint"] = manifest.fingerprint
        facts["aggregator template"] = str(manifest.settings["template"])
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _stages(run: Run) -> str:
    rows = []
    for stage in data_stages(run.config):
        manifest = run.manifest(stage)
        if manifest is None:
            continue
        left_out = {**manifest.filtered, **{f"failed: {error}": n for error, n in manifest.failed.items()}}
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "-"
        workers = f"{manifest.num_workers} on {manifest.num_nodes}" if manifest.num_workers else "-"
        tokens = f"about {manifest.completion_tokens}" if manifest.num_estimated else manifest.completion_tokens
        rows.append([stage, manifest.rows_in, manifest.rows_out, reasons, tokens, workers])
    return _table(["stage", "rows in", "rows out", "left out", "tokens generated", "workers on nodes"], rows)


def _examples(folder: Folder) -> str:
    lengths: dict[tuple[str, str], array[float]] = defaultdict(_numbers)
    trained: dict[tuple[str, str], array[float]] = defaultdict(_numbers)
    actions: Counter[str] = Counter()
    for row in _rows(folder, ["variant", "split", "labels", "length_action"]):
        key = (row["variant"], row["split"])
        lengths[key].append(len(row["labels"]))
        trained[key].append(sum(label >= 0 for label in row["labels"]))
        actions.update([row["length_action"]] if row["length_action"] else [])
    table = _table(
        ["variant", "split", "examples", "tokens", "trained tokens", "tokens per example", "trained per example"],
        [
            [
                *key,
                len(lengths[key]),
                int(sum(lengths[key])),
                int(sum(trained[key])),
                _spread(lengths[key]),
                _spread(trained[key]),
            ]
            for key in sorted(lengths)
        ],
    )
    done = ", ".join(f"{count} x {action}" for action, count in actions.most_common()) or "nothing"
    spreads = "Spreads are smallest / 5 % / quarter / median / three quarters / 95 % / largest."
    return f"{table}\n\n{spreads} To fit the window: {done}."


def _proposals(folder: Folder) -> str:
    sources: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    scores: dict[str, array[float]] = defaultdict(_numbers)
    for row in _rows(folder, ["proposals", "selected", "scorer"]):
        for index, proposal in enumerate(row["proposals"]):
            sources[f"{proposal['source']} {proposal['model']}, round {proposal['round']}"] += 1
            if proposal["score"] is None:
                reasons[proposal["score_error"] or "not scored"] += 1
                continue
            groups = ("all", "selected") if index in row["selected"] else ("all",)
            for group in groups:
                scores[f"{row['scorer']}, {group}"].append(proposal["score"])
    parts = [
        _table(["proposals from", "number"], sources.most_common()),
        _table(
            ["scorer, proposals", "number", "mean", "spread"],
            [[name, len(values), f"{np.mean(values):.3f}", _spread(values)] for name, values in sorted(scores.items())],
        ),
        "Without a score: " + (", ".join(f"{n} ({why})" for why, n in reasons.most_common(5)) or "none") + ".",
    ]
    return "\n\n".join(parts)


def _targets(folder: Folder) -> str:
    kept: Counter[str] = Counter()
    candidates = accepted = verified = with_verifier = reasoning = 0
    lengths = _numbers()
    for row in _rows(folder, ["target", "target_filter"]):
        target = row["target"]
        kept[row["target_filter"] or "kept"] += 1
        lengths.append(target["num_tokens"])
        reasoning += target["num_reasoning_tokens"] or 0
        if target["verified"] is not None:
            with_verifier += 1
            verified += target["verified"]
        if target["num_accepted"] is not None:
            candidates += target["num_candidates"]
            accepted += target["num_accepted"]
    lines = [
        _table(["targets", "number"], kept.most_common()),
        f"Tokens per target: {_spread(lengths)}." + (f" Reasoning: {reasoning} tokens in all." if reasoning else ""),
        f"Candidates the verifier accepts: {_share(accepted, candidates)}; targets it accepts: "
        f"{_share(verified, with_verifier)}.",
    ]
    return "\n\n".join(lines)


def _numbers() -> array[float]:
    """Return an empty array of floats: 8 bytes per row, where a list takes about 40."""
    return array("d")


def _rows(folder: Folder, columns: Sequence[str]) -> Iterable[Mapping[str, Any]]:
    for name in folder.names(".parquet"):
        yield from folder.read_table(name, columns).to_pylist()


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "no verifier"


def _spread(values: Sequence[float]) -> str:
    if not len(values):
        return "-"
    return " / ".join(f"{value:.4g}" for value in np.quantile(values, QUANTILES))


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
