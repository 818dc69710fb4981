"""The study: the whole method from one base model, with several seeds, through the ordinary steps of a run.

    folder = Path("runs/miniature")
    run_study(load_config(Path("configs/miniature/method.yaml")), num_seeds=3)

    runs/miniature/seed-1/        a whole run, with its own report
    runs/miniature/seed-2/ ...
    runs/miniature/report/        miniature.html and results.json: all seeds together

Every seed draws its own questions, samples its own proposals and trains its own models; the base model is the same.
Run again, it continues: each seed's run resumes where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aft_ray.config import Config, load_config
from aft_ray.errors import InputError
from aft_ray.evaluation.perplexity import TargetScore
from aft_ray.miniature.answers import Answered, Study, study_of
from aft_ray.pipeline.cluster import RaySession
from aft_ray.pipeline.evaluate import PERPLEXITY, systems_of
from aft_ray.runs import RESOLVED, Run, commit
from aft_ray.storage import Folder


def study_of_run(config: Config) -> Config:
    """Return the settings of the study that a run names; its folder is `miniature/` in the run's folder.

    Raises ConfigError when the study's YAML cannot be read.
    """
    assert config.miniature is not None
    return load_config(Path(config.miniature), [f"run.dir={config.run.dir}/miniature"])


def run_study(config: Config, num_seeds: int, run_line: Callable[[Config], object]) -> Study:
    """Run seeds `run.seed`, `run.seed` + 1, ... into folders below `run.dir`, and write the page over all of them.

    `run_line` takes one run through every step: it is passed in because a run may itself hold a study. A connection to
    Ray that is already open is used. A finished study is read again in seconds, without starting Ray.
    """
    from aft_ray.miniature.page import write_page

    started = time.monotonic()
    configs = [_of_seed(config, config.run.seed + number) for number in range(num_seeds)]
    with RaySession(config) as session:
        if not all(_has_report(one) for one in configs):
            session.connect()  # once for all seeds
        for one in configs:
            print(f"── seed {one.run.seed} {'─' * 60}", file=sys.stderr)
            run_line(one)
    minutes = (time.monotonic() - started) / 60
    study = collect(configs)
    write_page(study, Path(config.run.dir) / "report", config, commit(), minutes)
    return study


def _of_seed(config: Config, seed: int) -> Config:
    run = config.run.model_copy(update={"dir": f"{config.run.dir}/seed-{seed}", "seed": seed})
    return config.model_copy(update={"run": run})


def _has_report(config: Config) -> bool:
    return Path(config.run.dir, "report", "report.html").is_file()


def load_study(folder: Path) -> Study:
    """Return the finished study below `folder`, read from the runs of its seeds again."""
    runs = sorted(folder.glob("seed-*"), key=lambda run: int(run.name.removeprefix("seed-")))
    if not runs:
        raise InputError(f"{folder}: no finished study there (no folder seed-N)")
    return collect([load_config(run / RESOLVED, [f"run.dir={run}"]) for run in runs])


def collect(configs: list[Config]) -> Study:
    """What the finished runs of several seeds hold."""
    answered: list[Answered] = []
    scores: dict[int, list[TargetScore]] = {}
    pseudo: list[bool] = []
    for config in configs:
        run = Run(config, Folder.at(config.run.dir))
        evaluation = run.folder.child("evaluation")
        for system in systems_of(run):
            rows = evaluation.child(system.name).child("answers").rows()
            answered += [Answered.of(row, system.name, config.run.seed) for row in rows]
        stored: list[dict[str, Any]] = json.loads(evaluation.read_bytes(PERPLEXITY))
        scores[config.run.seed] = [TargetScore(**score) for score in stored]
        targets = [row["pseudo_target"] for row in run.folder.child("targets").rows()]
        pseudo += [bool(target["verified"]) for target in targets if target]
    return study_of(answered, scores, pseudo, configs[0].evaluation.num_bootstrap)
