"""targets -> training_set: writes token ids and labels once; training reads nothing else.

in    + target; of prompts alone, those with their own answers (`training_set.source`)
out   example_id, prompt_id, variant, split, input_ids, labels, num_tokens, prompt_text, target_text, length_action
on    CPU (a tokenizer)

A row makes one example per variant and accepted target (`joint` makes two; a conversation whose every answer is
learnt, one unless the template asks for more). The token ids are the ones that serving
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
from aft_ray.data.targets import last_stage
from aft_ray.errors import ConfigError, InputError, PromptTooLong
from aft_ray.models import resolve_model, tokenizer_hash
from aft_ray.records import TRAINING_SET, Message, derive_seed
from aft_ray.runs import Run
from aft_ray.shards import Processed, RowWorker, Stage
from aft_ray.templates import (
    AggregatorTemplate,
    ChatFormat,
    answer_spans,
    build_conversation,
    build_example,
    check_mask,
    fit_aggregation,
    fit_prompt,
)
from aft_ray.templates.families import template_hash
from aft_ray.templates.thinking import with_thinking

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


def _target_texts(row: Mapping[str, Any], variant: Variant, thinking: str) -> list[str]:
    if variant == "sft_reference":
        if not row["reference"]:
            raise InputError("variant sft_reference needs a reference answer, but this prompt has none")
        return [str(row["reference"])]
    if variant == "pseudo":
        return [_taught(row["pseudo_target"], thinking)]
    return [_taught(target, thinking) for target in (row["target"], *(row["accepted_targets"] or []))]


def examples_of(row: Mapping[str, Any], variant: Variant, thinking: str = "remove") -> Iterator[tuple[str, str, Shown]]:
    """Yield the id of each example that a row makes of a variant, its target, and what is shown before it."""
    for number, target in enumerate(_target_texts(row, variant, thinking), start=1):
        for suffix, shown in PARTS[variant]:
            yield f"{row['prompt_id']}-{variant}{suffix}" + (f"-{number}" if number > 1 else ""), target, shown


def _taught(target: Mapping[str, Any], thinking: str) -> str:
    """Return the text that a target teaches: the answer, with the teacher's thinking before it where that is kept."""
    return with_thinking(target["reasoning"] or "", target["text"]) if thinking == "keep" else str(target["text"])


def unusable(
    row: Mapping[str, Any], variants: Sequence[Variant], finish_reasons: Sequence[str] = ("stop",)
) -> str | None:
    """Return why a row must not be trained on, or None. A pseudo target must have ended for one of the reasons, too."""
    if row["target_filter"]:
        return str(row["target_filter"])
    pseudo = row["pseudo_target"]
    is_whole = pseudo and pseudo["text"].strip() and pseudo["finish_reason"] in finish_reasons
    if "pseudo" in variants and not is_whole:
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
    tokenizer = engine.tokenizer if engine.type == "scripted" else resolve_model(engine.model, weights=False)
    if tokenizer is None:
        raise ConfigError("training_set needs the tokenizer of the model to train; set engine.tokenizer")
    return tokenizer


def format_to_train(engine: EngineConfig) -> ChatFormat:
    """Return the format of the model to train. Raises ConfigError where neither it nor its engine has a template."""
    assert engine.type != "openai"  # such a config is refused
    trusted = getattr(engine, "trust_remote_code", False)
    tokenizer = tokenizer_of(engine)
    return ChatFormat.load(tokenizer, style="chat", chat_template=engine.chat_template, trust_remote_code=trusted)


def check_thinking(thinking: str, format: ChatFormat) -> None:
    """Raise ConfigError where thinking is to be learnt as text, and to the model's tokenizer its tags are control
    tokens: its own template decides where these stand.
    """
    tags = with_thinking("x", "")
    if thinking == "keep" and format.neutralise(tags) != tags:
        raise ConfigError(
            "training_set.thinking keep writes <think> tags as text, and the model to train has control tokens of that "
            "name. Set it to remove"
        )


class TrainingSetWorker(RowWorker):
    """Makes the training examples of a row."""

    def __init__(
        self,
        config: TrainingSetConfig,
        engine: EngineConfig,
        templates: TemplatesConfig,
        seed: int,
        finish_reasons: Sequence[str] = ("stop",),
    ) -> None:
        self.config, self.templates, self.seed, self.finish_reasons = config, templates, seed, finish_reasons
        self.format = format_to_train(engine)
        check_thinking(config.thinking, self.format)
        self.template = AggregatorTemplate.load(templates.aggregator)

    async def process(self, row: dict[str, Any]) -> Processed:
        is_made = self.config.source == "targets"
        if is_made and (reason := unusable(row, self.config.variants, self.finish_reasons)):
            return Processed(rows=[], filtered=reason)
        examples = [example for variant in self.config.variants for example in self._examples(row, variant)]
        num_tokens = sum(example["num_tokens"] for example in examples)
        return Processed(rows=examples, prompt_tokens=num_tokens)

    def _examples(self, row: Mapping[str, Any], variant: Variant) -> Iterator[dict[str, Any]]:
        """Yield the examples of one variant. Raises PromptTooLong, or InputError (no reference, broken mask)."""
        for name, target, shown in examples_of(row, variant, self.config.thinking):
            origin = {"prompt_id": row["prompt_id"], "variant": variant, "split": row["split"]}
            if self.config.answers == "all":
                for number, example in enumerate(self._conversation(row, target), start=1):
                    yield {"example_id": name + (f"-{number}" if number > 1 else ""), **origin, **example}
            else:
                yield {"example_id": name, **origin, **self._example(row, target, shown)}

    def _conversation(self, row: Mapping[str, Any], answer: str) -> Iterator[dict[str, Any]]:
        """Yield the examples of a conversation with every answer in the loss."""
        messages = [*row["messages"], Message(role="assistant", content=answer)]
        for input_ids, labels in build_conversation(messages, self.format):
            if len(input_ids) > self.config.max_length:
                raise PromptTooLong(
                    f"conversation of {len(input_ids)} tokens > training_set.max_length {self.config.max_length}"
                )
            check_mask(input_ids, labels, self.format, several_answers=True)
            start = answer_spans(labels)[-1][0]
            yield {
                "input_ids": input_ids,
                "labels": labels,
                "num_tokens": len(input_ids),
                "prompt_text": self.format.decode(input_ids[:start]),
                "target_text": self.format.decode(input_ids[start:]),
                "length_action": None,
            }

    def shown_messages(self, row: Mapping[str, Any], target: str, shown: Shown) -> tuple[Sequence[Message], str | None]:
        """Return the messages that the model sees before a target, and what was done to make them fit."""
        if shown == "prompt":
            return row["messages"], None
        # The target is never truncated, so the prompt gets the tokens that the target leaves.
        room = self.config.max_length - len(self.format.target_ids(row["messages"], target))
        proposals = shown_proposals(row, self.config, self.seed)
        slots = proposals if shown == "proposals" else [""] * len(proposals)
        policy = self.templates.length_policy
        fitted = fit_aggregation(self.format, self.template, row["messages"], slots, room, policy)
        return fitted.messages, fitted.action

    def _example(self, row: Mapping[str, Any], target: str, shown: Shown) -> dict[str, Any]:
        max_length = self.config.max_length
        messages, action = self.shown_messages(row, target, shown)
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
            "num_tokens": len(input_ids),
            "prompt_text": self.format.decode(prompt_ids),
            "target_text": target,
            "length_action": action,
        }


def stage(run: Run) -> Stage:
    """Return the training_set stage of a run."""
    config = run.config
    template = getattr(config.engine, "chat_template", None)
    unset = {"placement"} | ({"source", "answers"} if config.makes_targets else set())
    return Stage(
        name="training_set",
        source=run.folder.child(last_stage(config)),
        output=run.folder.child("training_set"),
        schema=TRAINING_SET,
        settings={
            "training_set": config.training_set.model_dump(mode="json", exclude=unset),
            "model": getattr(config.engine, "model", None),
            "tokenizer": tokenizer_hash(tokenizer_of(config.engine)),
            "template": aggregator_hash(config.templates),
            **({"chat_template": template_hash(template)} if template is not None else {}),
            "length_policy": config.templates.length_policy,
            "seed": config.run.seed if config.training_set.vary_num_proposals else None,
        },
        worker=partial(
            TrainingSetWorker,
            config.training_set,
            config.engine,
            config.templates,
            config.run.seed,
            config.targets.filters.finish_reasons,
        ),
        placement=config.training_set.placement,
        must_yield=True,
        is_light=True,
    )
