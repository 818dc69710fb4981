"""Several runs as one command: `aft-ray run --config a.yaml --config b.yaml`.

All settings are checked before the first run starts. The runs follow each other, each in its own folder; one that fails
does not keep the next from starting. The same command continues where it stopped, since every run resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aft_ray.config import Config
from aft_ray.errors import AftError, ConfigError
from aft_ray.pipeline.checks import check_before_start
from aft_ray.pipeline.steps import run_steps
from aft_ray.runs import Resume
from aft_ray.storage import Folder


def run_sweep(configs: Sequence[Config], names: Sequence[str], resume: Resume, retry_failed: bool = False) -> int:
    """Run the named steps of every config, print how each run ended, and return the first exit code that is not 0.

    Raises ConfigError, before anything starts, where two configs have one folder or one of them cannot work.
    """
    places = [Folder.at(config.run.dir).location for config in configs]
    for place in places:
        if places.count(place) > 1:
            raise ConfigError(f"two of the configs have run.dir {place}: each run needs a folder of its own")
    for config in configs:
        check_before_start(config)
    ends: list[tuple[str, int, str]] = []
    for number, (place, config) in enumerate(zip(places, configs, strict=True), start=1):
        print(f"── run {number} of {len(configs)}: {place}", file=sys.stderr, flush=True)
        try:
            run_steps(config, names, resume, retry_failed)
        except AftError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            ends.append((place, error.exit_code, f"failed: {type(error).__name__}"))
        else:
            ends.append((place, 0, "done"))
    for place, _, end in ends:
        print(f"{place}: {end}")
    return next((code for _, code, _ in ends if code), 0)
