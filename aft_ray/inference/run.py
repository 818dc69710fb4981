"""One run of a plan: what all its layers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aft_ray.engines.base import Sampling
from aft_ray.errors import PromptTooLong
from aft_ray.inference.events import LayerUsage
from aft_ray.inference.plan import ONE_ANSWER, FinalLayer, Plan
from aft_ray.inference.role import Role
from aft_ray.records import Message
from aft_ray.templates import AggregatorTemplate


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that is the same in all layers of one run."""

    prompt_id: str
    messages: tuple[Message, ...]
    plan: Plan
    proposers: tuple[Role, ...]
    aggregator: Role
    template: AggregatorTemplate
    run_seed: int
    request_id: str
    on_usage: Callable[[LayerUsage], None] | None = None
    """Called with the usage of each layer when the layer is over."""
    final: FinalLayer = ONE_ANSWER

    def report_usage(self, usage: LayerUsage) -> None:
        """Report what a layer cost. Every layer is reported, however it ended."""
        if self.on_usage is not None:
            self.on_usage(usage)

    def sampling_of(self, layer: int, role: Role) -> Sampling:
        """Return the plan's sampling of a layer, with the stop strings of the role's prompt format added."""
        return self.plan.sampling_of(layer).also_stopping_at(role.format.stop_strings)

    def max_prompt_tokens(self, layer: int, role: Role) -> int:
        """Return how many tokens of the role's window are left for the prompt."""
        window = role.engine.info.max_model_len
        max_tokens = self.plan.sampling_of(layer).max_tokens
        if max_tokens >= window:
            raise PromptTooLong(
                f"layer {layer}: max_tokens {max_tokens} leaves no room for a prompt in the model's window of {window} "
                "tokens. Lower max_tokens, or raise the engine's max_model_len"
            )
        return window - max_tokens
