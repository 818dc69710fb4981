"""targets -> training_set: writes token ids and labels once; training reads nothing else.

in    + target
out   example_id, prompt_id, variant, split, input_ids, labels, prompt_text, target_text, length_action
on    CPU (a tokenizer)

A row makes one example per variant and accepted target (`joint` makes two). The token ids are the ones that serving
sends for the same conversation, since both come from `templates`. A row whose target must not be trained on is left out
of every variant and counted by reason, so that variants are compared on the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from aft_ray.config import EngineConfig, TemplatesConfig, TrainingSetConfig, Variant
from aft_ray.data.proposals import aggregator_hash
from aft_ray.data.selection import selected_texts
from aft_ray.errors import ConfigError, InputError, PromptTooLong
from aft_ray.models import resolve_model, tokenizer_hash
from aft_ray.records import TRAINING_SET, derive_seed
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.templates import (
    AggregatorTemplate,
    ChatFormat,
    InContextPrompt,
    build_example,
    check_mask,
    fit_aggregation,
    fit_prompt,
)

Shown = Literal["prompt", "proposals", "empty slots"]

PARTS: dict[Variant, tuple[tuple[str, Shown], ...]] = {
    "sft": (("", "prompt"),),
    "aft": (("", "proposals"),),
    "joint": (("-propose", "prompt"), ("-aggregate", "proposals")),
    "sft_reference": (("", "prompt"),),
    "no_proposals": (("", "empty slots"),),
    "pseudo": (("", "proposals"),),
}
"""The examples of each variant: the suffix of the example's id, and what the model sees before the target."""


def _target_texts(row: Mapping[str, Any], variant: Variant) -> list[str]:
    if variant == "sft_reference":
        if not row["reference"]:
            raise InputError("variant sft_reference needs a reference answer, but this prompt has none")
        return [str(row["reference"])]
    if variant == "pseudo":
        return [str(row["pseudo_target"]["text"])]
    return [str(target["text"]) for target in (row["target"], *(row["accepted_targets"] or []))]


def unusable(row: Mapping[str, Any], variants: Sequence[Variant]) -> str | None:
    """Return why a row must not be trained on, or None."""
    if row["target_filter"]:
        return str(row["target_filter"])
    pseudo = row["pseudo_target"]
    if "pseudo" in variants and (not pseudo or not pseudo["text"].strip() or pseudo["finish_reason"] == "length"):
        return "empty or truncated pseudo target"
    return None


def shown_proposals(row: Mapping[str, Any], config: TrainingSetConfig, seed: int) -> list[str]:
    """Return the proposals to show in an example: all selected ones, or the first K, with K drawn for this prompt."""
    texts = selected_texts(row)
    if config.vary_num_proposals is None:
        return texts
    smallest, largest = config.vary_num_proposals
    return texts[: random.Random(derive_seed(seed, row["prompt_id"], 0, -3)).randint(smallest, largest)]


def tokenizer_of(engine: EngineConfig) -> str:
    """Return the tokenizer folder of the model to train. Raises ConfigError if a scripted engine has no tokenizer."""
    tokenizer = engine.tokenizer if engine.type == "scripted" else resolve_model(engine.model)
    if tokenizer is None:
        raise ConfigError("training_set needs the tokenizer of the model to train; set engine.tokenizer")
    return tokenizer


class TrainingSetWorker(RowWorker):
    """Makes the training examples of a row."""

    def __init__(self, config: TrainingSetConfig, engine: EngineConfig, templates: TemplatesConfig, seed: int) -> None:
        self.config, self.templates, self.seed = config, templates, seed
        self.format = ChatFormat.load(tokenizer_of(engine), InContextPrompt.load(templates.in_context))
        self.template = AggregatorTemplate.load(templates.aggregator)

    async def process(self, row: dict[str, Any]) -> Processed:
        if reason := unusable(row, self.config.variants):
            return Processed(rows=[], filtered=reason)
        examples = [example for variant in self.config.variants for example in self._examples(row, variant)]
        num_tokens = sum(len(example["input_ids"]) for example in examples)
        return Processed(rows=examples, prompt_tokens=num_tokens)

    def _examples(self, row: Mapping[str, Any], variant: Variant) -> Iterator[dict[str, Any]]:
        """Yield the examples of one variant. Raises PromptTooLong, or InputError (no reference, broken mask)."""
        for number, target in enumerate(_target_texts(row, variant), start=1):
            for suffix, shown in PARTS[variant]:
                name = f"{row['prompt_id']}-{variant}{suffix}" + (f"-{number}" if number > 1 else "")
                yield {
                    "example_id": name,
                    "prompt_id": row["prompt_id"],
                    "variant": variant,
                    "split": row["split"],
                    **self._example(row, target, shown),
                }

    def _example(self, row: Mapping[str, Any], target: str, shown: Shown) -> dict[str, Any]:
        messages, action, max_length = row["messages"], None, self.config.max_length
        if shown != "prompt":
            # The target is never truncated, so the prompt gets the tokens that the target leaves.
            room = max_length - len(self.format.target_ids(row["messages"], target))
            proposals = shown_proposals(row, self.config, self.seed)
            slots = proposals if shown == "proposals" else [""] * len(proposals)
            policy = self.templates.length_policy
            fitted = fit_aggregation(self.format, self.template, messages, slots, room, policy)
            messages, action = fitted.messages, fitted.action
        prompt_ids = fit_prompt(self.format, messages, max_length)
        target_ids = self.format.target_ids(messages, target)
        if len(prompt_ids) + len(target_ids) > max_length:
            raise PromptTooLong(
                f"prompt {len(prompt_ids)} + target {len(target_ids)} tokens > training_set.max_length {max_length}"
            )
        input_ids, labels = build_example(prompt_ids, target_ids)
        check_mask(input_ids, labels, self.format)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "prompt_text": self.format.decode(prompt_ids),
            "target_text": target,
            "length_action": action,
        }


def stage(run: Run) -> Stage:
    """Return the training_set stage of a run."""
    config = run.config
    return Stage(
        name="training_set",
        source=run.folder.child("targets"),
        output=run.folder.child("training_set"),
        schema=TRAINING_SET,
        settings={
            "training_set": config.training_set.model_dump(mode="json", exclude={"placement"}),
            "model": getattr(config.engine, "model", None),
            "tokenizer": tokenizer_hash(tokenizer_of(config.engine)),
            "template": aggregator_hash(config.templates),
            "length_policy": config.templates.length_policy,
            "seed": config.run.seed if config.training_set.vary_num_proposals else None,
        },
        worker=partial(TrainingSetWorker, config.training_set, config.engine, config.templates, config.run.seed),
        placement=config.training_set.placement,
    )
