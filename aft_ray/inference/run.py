"""One run of a plan: what all its layers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aft_ray.engines.base import Sampling
from aft_ray.errors import PromptTooLong
from aft_ray.inference.events import LayerUsage
from aft_ray.inference.plan import ONE_ANSWER, FinalLayer, Plan
from aft_ray.inference.role import Role
from aft_ray.records import Message
from aft_ray.templates import AggregatorTemplate, PromptFormat
from aft_ray.templates.tools import describing_tools


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
    cache_salt: str | None = None
    """Which runs may share cached prompts with this one (`GenerateRequest.cache_salt`)."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the chat templates are told besides the messages, in every layer."""

    def format_of(self, layer: int, role: Role) -> PromptFormat:
        """Return the role's format for a layer: the last one writes prompts with the tools that it may call."""
        tool_use = self.final.tool_use if layer == self.plan.num_layers else None
        tools = tool_use.tools if tool_use is not None and tool_use.may_call else ()
        return role.format.rendering(tools, self.template_arguments)

    def conversation(self, layer: int) -> tuple[Message, ...]:
        """Return the messages for a layer: one that cannot call the tools sees them described."""
        tool_use = self.final.tool_use
        if tool_use is None or (layer == self.plan.num_layers and tool_use.may_call):
            return self.messages
        return describing_tools(self.messages, tool_use.tools)

    def report_usage(self, usage: LayerUsage) -> None:
        """Report what a layer cost. Every layer is reported, however it ended."""
        if self.on_usage is not None:
            self.on_usage(usage)

    def sampling_of(self, layer: int, role: Role, num_prompt_tokens: int) -> Sampling:
        """Return the plan's sampling of a layer, with the stop strings of the role's prompt format added.

        Where `max_tokens` may be lowered (`FinalLayer.least_tokens`), it is what the prompt leaves of the window.
        """
        sampling = self.plan.sampling_of(layer).also_stopping_at(role.format.stop_strings)
        if self.least_tokens_of(layer) == sampling.max_tokens:
            return sampling
        room = role.engine.info.max_model_len - num_prompt_tokens
        return dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))

    def least_tokens_of(self, layer: int) -> int:
        """Return how many tokens an answer of a layer must have room for."""
        asked, least = self.plan.sampling_of(layer).max_tokens, self.final.least_tokens
        return asked if least is None or layer < self.plan.num_layers else min(asked, least)

    def max_prompt_tokens(self, layer: int, role: Role) -> int:
        """Return how many tokens of the role's window are left for the prompt."""
        window = role.engine.info.max_model_len
        max_tokens = self.least_tokens_of(layer)
        if max_tokens >= window:
            of = "" if layer == self.plan.num_layers else f" of the plan's {'aggregation' if layer else 'proposal'}"
            raise PromptTooLong(
                f"layer {layer}: max_tokens {max_tokens} leaves no room for a prompt in the model's window of {window} "
                f"tokens. Lower max_tokens{of}, or raise the engine's max_model_len"
            )
        return window - max_tokens
