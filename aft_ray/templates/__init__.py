"""The only place where text becomes token ids. Data, training, serving and evaluation all call it.

    control      breaks strings inside messages that would otherwise act as control tokens
    format       the `PromptFormat` protocol; `MessagesFormat` for endpoints that take messages
    chat         `ChatFormat`: chat template or in-context prompt -> ids, once, with one BOS
    in_context   `InContextPrompt`: the prompt for base models (URIAL format)
    aggregator   `AggregatorTemplate`: how proposals are shown to the model that aggregates them
    budget       `fit_prompt`, `fit_aggregation`: what is shortened when a prompt does not fit the window
    mask         `build_example`, `build_conversation`, `check_mask`: the loss is on answers and what ends them
    loading      `load_format`: the format that an engine needs

Importing this loads neither torch nor transformers; `ChatFormat.load` does.
"""

from aft_ray.templates.aggregator import AggregatorTemplate
from aft_ray.templates.budget import Fitted, LengthPolicy, fit_aggregation, fit_prompt
from aft_ray.templates.chat import ChatFormat, Style
from aft_ray.templates.format import MessagesFormat, PromptFormat
from aft_ray.templates.in_context import InContextPrompt
from aft_ray.templates.mask import IGNORE, answer_spans, build_conversation, build_example, check_mask

__all__ = [
    "IGNORE",
    "AggregatorTemplate",
    "ChatFormat",
    "Fitted",
    "InContextPrompt",
    "LengthPolicy",
    "MessagesFormat",
    "PromptFormat",
    "Style",
    "answer_spans",
    "build_conversation",
    "build_example",
    "check_mask",
    "fit_aggregation",
    "fit_prompt",
]
