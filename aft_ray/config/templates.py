"""The templates around prompts and proposals."""

from __future__ import annotations

from aft_ray.config.strict import Strict
from aft_ray.templates.budget import LengthPolicy


class TemplatesConfig(Strict):
    """The templates around prompts and proposals, and the policy for inputs that are too long."""

    aggregator: str = "aft"
    """The aggregator prompt: `aft`, or a YAML file with `name`, `system` and `slot` (docs/templates.md)."""
    in_context: str = "default"
    """Demonstrations for base models without a chat template: `default`, or a YAML file."""
    length_policy: LengthPolicy = "drop_longest"
    """What is shortened when prompt, proposals and answer do not fit the window: `drop_longest` drops the longest
    proposal until the rest fits, `truncate_each` cuts every proposal to the same length, `fewer` drops the last
    proposal until the rest fits, `error` shortens nothing and fails the row or request."""
