"""The results in a run's folders, as a report and as tables in the terminal at the end of a run."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from aft_ray.data.constraints import parse_all
from aft_ray.data.proposals import data_stages
from aft_ray.data.scorers import build_scorer, text_scorer_config
from aft_ray.evaluation.examples import Check, Example, choose_examples
from aft_ray.evaluation.metrics import Comparison, ScoredAnswer, compare, score_answers, system_metrics
from aft_ray.evaluation.perplexity import ConditionPerplexity, TargetScore, summarise
from aft_ray.evaluation.report import (
    MethodAnswer,
    ReportData,
    StageSummary,
    TrainingSummary,
    curve_of,
    held_out_curves,
    write_report,
)
from aft_ray.evaluation.stage import NOT_HELD_OUT
from aft_ray.pipeline.evaluate import PERPLEXITY, serving_of, systems_of
from aft_ray.records import HELD_OUT, TRAIN, metadata_of
from aft_ray.runs import Manifest, Run, commit, versions
from aft_ray.training.metrics import read_metrics

REPORT = "report"
"""Folder of the report in a run's folder."""
NO_STUDY = "the study of the method is not finished; `aft-ray run` with this run's config finishes it"
REWARDS = {
    "constraints": "share of the prompt's one or two checkable constraints that the answer meets",
    "numeric": "1 when the answer's last number is the reference's, else 0",
    "reasoning_gym": "the task's own verifier, 0 to 1",
    "ifeval": "share of the prompt's IFEval instructions that the answer follows (strict)",
}


def report(run: Run) -> None:
    """Write the report and each system's metrics.json."""
    data = report_data(run)
    write_report(data, Path(run.folder.path) / REPORT)
    for system in data.systems:
        content = json.dumps(dataclasses.asdict(system), indent=1)
        run.folder.child("evaluation").child(system.system).write_bytes("metrics.json", content.encode())


def report_data(run: Run) -> ReportData:
    """Read everything the report shows from the run's folders."""
    config = run.config
    rows = {system.name: _answers(run, system.name) for system in systems_of(run)}
    scores = text_scorer_config(config.scores)
    scorer = build_scorer(scores)

    def score(row: Mapping[str, Any], text: str) -> float | None:
        return asyncio.run(scorer.score(row, [text])).scores[0].value if text else None

    scored = {name: score_answers(answers, score) for name, answers in rows.items()}
    resampling = {"num_resamples": config.evaluation.num_bootstrap, "seed": config.run.seed}
    prompts = run.folder.child("prompts").rows()
    tasks = sorted({row["task"] or "open" for row in prompts})
    method = _method(run)
    return ReportData(
        title=Path(run.folder.path).name,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        command=f"aft-ray run --config {Path(run.folder.path).name}/config.resolved.yaml",
        commit=commit(),
        model=str(getattr(config.engine, "model", config.engine.type)),
        num_parameters=_num_parameters(run),
        task=", ".join(tasks),
        num_train_prompts=sum(row["split"] == TRAIN for row in prompts),
        num_held_out_prompts=sum(row["split"] == HELD_OUT for row in prompts),
        reward="; ".join(REWARDS[task] for task in tasks if task in REWARDS) or f"scorer {scores.scorer}",
        plan=config.evaluation.plan,
        seed=config.run.seed,
        hardware=_hardware(),
        versions=versions(),
        stages=_stages(run),
        training=_training(run),
        perplexities=tuple(_perplexities(run, resampling)),
        systems=tuple(
            system_metrics(name, answers, num_failed=_num_failed(run, name), **resampling)
            for name, answers in scored.items()
        ),
        base_system=serving_of(run).base_name,
        comparisons=_comparisons(scored, resampling),
        examples=tuple(_examples(run, rows, score)),
        method=method,
        notes=(NO_STUDY,) if run.config.miniature is not None and method is None else (),
    )


def _method(run: Run) -> MethodAnswer | None:
    """Return the answer of the run's study of the method; None without a finished study."""
    from aft_ray.miniature.headline import headline, headline_points
    from aft_ray.miniature.page import PAGE
    from aft_ray.miniature.study import load_study, study_of_run

    folder = Path(run.folder.path) / "miniature"
    if run.config.miniature is None or not (folder / REPORT / PAGE).is_file():
        return None
    study = load_study(folder)
    return MethodAnswer(
        sentences=tuple(headline(study)),
        points=tuple(headline_points(study)),
        num_questions=study.num_questions,
        num_proposals=study_of_run(run.config).evaluation.plan.num_proposals,
        page=f"../miniature/{REPORT}/{PAGE}",
    )


def print_results(run: Run) -> None:
    """Print the end of a finished run from its report folder: the results, where they are, and what to try next."""
    from rich.console import Console

    page = Path(run.folder.path) / REPORT / "report.html"
    found: dict[str, Any] = json.loads(page.with_name("results.json").read_text())
    console = Console()
    for title, table in _tables(found):
        console.print(f"\n{title}", style="bold", highlight=False)
        console.print(table)
    for sentence in found["method"]["sentences"] if found["method"] else ():
        console.print(f"- {sentence}", highlight=False)
    folder = os.path.relpath(run.folder.path)
    console.print(f"\nreport: {os.path.relpath(page)}\n\ntry next:", highlight=False)
    for command in (
        f"serve --config {folder}/config.resolved.yaml",
        'ask "Name three rivers in Africa, as bullets." --show-proposals     (while it serves)',
        "run --config configs/quickstart.yaml --set run.dir=runs/mine --set prompts.source=my_prompts.jsonl",
    ):
        console.print(f"  {_aft_ray()} {command}", highlight=False, soft_wrap=True)


def _tables(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yield the title and table of each result; the answer about the method, where there is one, comes last."""
    rewards = Table("model", "a single answer", "aggregated from its drafts")
    for system in found["systems"]:
        plan = f"  (K={system['num_proposals']}, L={system['num_layers']})" if system["num_layers"] else ""
        rewards.add_row(system["system"], _interval(system["single"]), f"{_interval(system['final'])}{plan}")
    yield f"{found['model']}: mean reward on {found['num_held_out_prompts']} held-out prompts [95 % interval]", rewards
    if found["perplexities"]:
        num_targets = found["perplexities"][0]["nats_per_token"]["num"]
        perplexities = Table("model, and what it sees", "perplexity")
        for one in found["perplexities"]:
            value = {"mean": one["perplexity"], "low": one["low"], "high": one["high"]}
            perplexities.add_row(one["name"], _interval(value))
        yield f"{found['model']}: perplexity of {num_targets} held-out targets, lower is easier", perplexities
    if found["method"]:
        points = found["method"]["points"]
        ways = list(dict.fromkeys(point["series"] for point in points))
        rates = {(point["row"], point["series"]): _interval(point) for point in points}
        method = Table("model", *ways)
        for row in dict.fromkeys(point["row"] for point in points):
            method.add_row(row, *(rates.get((row, way), "–") for way in ways))
        yield f"Does training to aggregate work? Right answers to {found['method']['num_questions']} questions", method


def _aft_ray() -> str:
    """Return the command as it can be typed here: its name where that is on PATH, else its path."""
    return "aft-ray" if shutil.which("aft-ray") else os.path.relpath(Path(sys.executable).parent / "aft-ray")


def _interval(value: Mapping[str, float | None]) -> str:
    """Return `0.47 [0.30, 0.66]` from mean, low and high."""
    mean, low, high = value["mean"], value["low"], value["high"]
    if mean is None:
        return "–"
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _answers(run: Run, system: str) -> list[dict[str, Any]]:
    return run.folder.child("evaluation").child(system).child("answers").rows()


def _num_failed(run: Run, system: str) -> int:
    manifest = run.manifest(f"evaluation/{system}/answers")
    return manifest.num_failed if manifest else 0


def _stages(run: Run) -> tuple[StageSummary, ...]:
    named = [(name, run.manifest(name)) for name in data_stages(run.config)]
    named += [(f"answers: {s.name}", run.manifest(f"evaluation/{s.name}/answers")) for s in systems_of(run)]
    return tuple(_stage(name, manifest) for name, manifest in named if manifest is not None)


def _stage(name: str, manifest: Manifest) -> StageSummary:
    calls_a_model = manifest.completion_tokens > 0
    return StageSummary(
        name=name,
        rows_in=manifest.rows_in,
        rows_out=manifest.rows_out,
        rows_failed=manifest.num_failed,
        prompt_tokens=manifest.prompt_tokens if calls_a_model else None,
        completion_tokens=manifest.completion_tokens if calls_a_model else None,
        seconds=manifest.seconds,
        left_out={reason: count for reason, count in manifest.filtered.items() if reason != NOT_HELD_OUT},
    )


def _training(run: Run) -> tuple[TrainingSummary, ...]:
    return tuple(
        found for variant in run.config.training_set.variants if (found := _trained(Path(run.folder.path), variant))
    )


def _trained(folder: Path, variant: str) -> TrainingSummary | None:
    summary_file = folder / "model" / variant / "summary.json"
    if not summary_file.is_file():
        return None
    summary = json.loads(summary_file.read_text())["summary"]
    return TrainingSummary(
        variant=variant,
        num_examples=summary["num_rows"],
        num_steps=summary["num_steps"],
        num_workers=summary["world_size"],
        startup_seconds=summary["startup_seconds"],
        seconds=summary["seconds"],
        num_tokens=summary["num_tokens"],
        num_trained_tokens=summary["num_trained_tokens"],
        curve=curve_of(read_metrics(folder / "checkpoints" / variant / "metrics.jsonl")),
        held_out=held_out_curves(read_metrics(folder / "checkpoints" / variant / "held_out.jsonl")),
    )


def _perplexities(run: Run, resampling: Mapping[str, int]) -> Sequence[ConditionPerplexity]:
    folder = run.folder.child("evaluation")
    if not folder.exists(PERPLEXITY):
        return []
    return summarise([TargetScore(**score) for score in json.loads(folder.read_bytes(PERPLEXITY))], **resampling)


def _comparisons(scored: Mapping[str, list[ScoredAnswer]], resampling: Mapping[str, int]) -> tuple[Comparison, ...]:
    """Compare each system with the one before it, single and aggregated."""
    return tuple(
        compare((second, scored[second]), (first, scored[first]), of=of, **resampling)  # type: ignore[arg-type]
        for first, second in pairwise(scored)
        for of in ("single", "final")
    )


def _examples(run: Run, rows: Mapping[str, list[dict[str, Any]]], score: Any) -> list[Example]:
    """Choose drafts and aggregations of the AFT systems (of all systems where there is no AFT system)."""
    shown = [name for name in rows if "aft" in name] or list(rows)
    return [
        example
        for name in shown
        for example in choose_examples(
            name, rows[name], score, constraint_checks, num_examples=4, seed=run.config.run.seed
        )
    ]


def constraint_checks(row: Mapping[str, Any], text: str) -> list[Check]:
    """Return each constraint of a prompt of task `constraints` in words, and whether `text` meets it."""
    if row["task"] != "constraints":
        return []
    given = metadata_of(row)["constraints"]
    return [
        Check(name=describe(constraint), met=parsed.met_by(text))
        for constraint, parsed in zip(given, parse_all(given), strict=True)
    ]


def describe(constraint: Mapping[str, Any]) -> str:
    """Return `{"type": "num_bullets", "count": 3}` as `num bullets: 3`."""
    values = ", ".join(str(value) for key, value in constraint.items() if key != "type")
    return str(constraint["type"]).replace("_", " ") + (f": {values}" if values else "")


def _num_parameters(run: Run) -> int | None:
    """Count the parameters from the safetensors headers of the model folder; None for a hub id."""
    from safetensors import safe_open

    from aft_ray.models import resolve_model

    model = getattr(run.config.engine, "model", None)
    folder = Path(resolve_model(model)) if model else None
    if folder is None or not folder.is_dir():
        return None
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total or None


def _hardware() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} CPU cores ({platform.machine()})" + (f", {len(gpus)} x {gpus[0]}" if gpus else ", no GPU")
