"""Which words go around the data."""

from __future__ import annotations

from aft_ray.config.strict import Strict
from aft_ray.templates.budget import LengthPolicy


class TemplatesConfig(Strict):
    """Which words go around the data."""

    aggregator: str = "aft"
    """`aft`, or a YAML file with `name`, `system`, `slot` (docs/templates.md)."""
    in_context: str = "default"
    """`default`, or a YAML file with demonstrations, for base models without a chat template."""
    length_policy: LengthPolicy = "drop_longest"
