"""`python -m aft_ray.miniature study` and `... base`; see the package and docs/miniature.md."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from aft_ray.cli import ConfigFile, Overrides, guarded

app = typer.Typer(help="The miniature.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def study(
    config: ConfigFile = "configs/miniature/method.yaml",
    overrides: Overrides = [],  # noqa: B006 (typer reads the default)
    num_seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs, with seeds run.seed, run.seed + 1, ...")] = 3,
) -> None:
    """The method with several seeds from the stored base model, and what came of it. Called again, it continues."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.miniature.page import PAGE, print_study
    from aft_ray.miniature.study import run_study
    from aft_ray.pipeline import LINE
    from aft_ray.pipeline.steps import run_steps

    print_study(run_study(loaded, num_seeds, run_line=partial(run_steps, names=LINE)))
    print(f"\npage: {loaded.run.dir}/report/{PAGE}")


@app.command()
def base(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the base model to.")],
    config: ConfigFile = "configs/miniature/base.yaml",
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Pretrain the base model. Called again, it continues."""
    from aft_ray.config import load_config

    loaded = load_config(config, overrides)
    from aft_ray.miniature.base import make_base

    make_base(loaded, output)
    print(f"{output}: the base model of {loaded.run.dir}")


if __name__ == "__main__":
    sys.exit(guarded(app))
