"""The loss mask: a built example passes the check, and the check names every way of breaking it."""

from __future__ import annotations

import pytest
from families import CONVERSATION, FAMILIES, assistant, format_of, system, user

from aft_ray.errors import InputError
from aft_ray.templates import (
    IGNORE,
    AggregatorTemplate,
    ChatFormat,
    answer_spans,
    build_conversation,
    build_example,
    check_mask,
)


def example(format: ChatFormat, target: str = "Good day") -> tuple[list[int], list[int]]:
    return build_example(format.prompt_ids(CONVERSATION), format.target_ids(CONVERSATION, target))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["Good day", "", "<|im_end|></s><eos> # Answer:\n```", "assistant:"])
def test_what_is_built_passes_in_every_family(family: str, target: str) -> None:
    format = format_of(family)
    check_mask(*example(format, target), format)
    messages = AggregatorTemplate.load("aft").messages(CONVERSATION, [target, "b"])
    check_mask(*build_example(format.prompt_ids(messages), format.target_ids(messages, target)), format)


def test_labels_are_the_target_and_nothing_else() -> None:
    assert build_example((5, 6, 7), (8, 9)) == ([5, 6, 7, 8, 9], [IGNORE, IGNORE, IGNORE, 8, 9])


@pytest.mark.parametrize(("prompt", "target"), [((), (1,)), ((1,), ())])
def test_an_example_needs_both_parts(prompt: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="needs a prompt and a target"):
        build_example(prompt, target)


def test_a_loss_that_begins_too_early_is_named(format: ChatFormat) -> None:
    ids, labels = example(format)
    start = labels.count(IGNORE)
    labels[start - 1] = ids[start - 1]
    with pytest.raises(
        InputError, match=f"prompt outside the loss: labels begin at {start - 1}, the target at {start}"
    ):
        check_mask(ids, labels, format)
    with pytest.raises(InputError, match="prompt outside the loss: the first label is a token"):
        check_mask(ids, ids, format)


def test_a_loss_on_an_earlier_answer_is_named(format: ChatFormat) -> None:
    ids, _ = example(format)
    first = len(format.prompt_ids(CONVERSATION[:1]))
    with pytest.raises(InputError, match=f"prompt outside the loss: labels begin at {first}"):
        check_mask(ids, [IGNORE] * first + ids[first:], format)


def test_a_loss_that_begins_too_late_is_named(format: ChatFormat) -> None:
    ids, labels = example(format)
    start = labels.count(IGNORE)
    labels[start] = IGNORE
    with pytest.raises(InputError, match=f"first target token inside the loss: labels begin at {start + 1}"):
        check_mask(ids, labels, format)
    with pytest.raises(InputError, match="first target token inside the loss: all"):
        check_mask(ids, [IGNORE] * len(ids), format)


def test_an_end_outside_the_loss_is_named(format: ChatFormat) -> None:
    ids, labels = example(format)
    with pytest.raises(InputError, match="end-of-turn inside the loss"):  # a collator that masks pad where pad is eos
        check_mask(ids, [*labels[:-1], IGNORE], format)
    with pytest.raises(InputError, match="end-of-turn inside the loss and last"):
        check_mask(ids[:-1], labels[:-1], format)
    with pytest.raises(InputError, match="end-of-turn inside the loss and last"):
        check_mask([*ids, 198], [*labels, 198], format)
    with pytest.raises(InputError, match="the target contains id"):
        check_mask([*ids, ids[-1]], [*labels, ids[-1]], format)


@pytest.mark.parametrize("family", ["llama3", "mistral", "gemma", "zephyr", "base_with_bos"])
def test_a_missing_or_second_bos_is_named(family: str) -> None:
    format = format_of(family)
    ids, labels = example(format)
    with pytest.raises(InputError, match="exactly one BOS, in front: id 304 occurs 2 times"):
        check_mask([ids[0], *ids], [IGNORE, *labels], format)
    with pytest.raises(InputError, match="exactly one BOS, in front: id 304 occurs 0 times"):
        check_mask(ids[1:], labels[1:], format)


def test_labels_that_are_other_tokens_or_too_few_are_named(format: ChatFormat) -> None:
    ids, labels = example(format)
    start = labels.count(IGNORE)
    with pytest.raises(InputError, match=f"labels equal the input ids from the target on: place {start + 1}"):
        check_mask(ids, [*labels[: start + 1], 7, *labels[start + 2 :]], format)
    with pytest.raises(InputError, match="one label per token"):
        check_mask(ids, labels[1:], format)


def test_an_example_of_another_format_is_refused() -> None:
    with pytest.raises(InputError, match="generation prompt"):
        check_mask(*example(format_of("mistral")), format_of("chatml"))


def test_the_ids_that_training_sees_begin_with_the_ids_that_serving_sends(format: ChatFormat) -> None:
    messages = AggregatorTemplate.load("aft").messages([user("Hello there")], ["Good day", "<s> Be kind"])
    sent = format.prompt_ids(messages)
    ids, labels = build_example(sent, format.target_ids(messages, "Good day"))
    assert tuple(ids[: labels.count(IGNORE)]) == sent


TALK = [
    user("Hello there"),
    assistant("Good day"),
    user("Be kind <b>{x}</b>"),
    assistant(""),
    user("user"),
    assistant("Hello <|im_end|>"),
]
"""An empty answer teaches nothing; a control token that is written out is text."""


def test_every_answer_of_a_conversation_is_in_the_loss_where_the_template_writes_it() -> None:
    format = format_of("chatml")
    by_hand = [  # what the template writes, and whether it is in the loss
        (
            "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n",
            False,
        ),
        ("Good day<|im_end|>", True),
        ("\n<|im_start|>user\nBe kind <b>{x}</b><|im_end|>\n<|im_start|>assistant\n<|im_end|>\n", False),
        ("<|im_start|>user\nuser<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hello <\u200b|im_end|><|im_end|>", True),
    ]
    ids, labels = [], []
    for text, is_trained in by_hand:
        part = format.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if is_trained else [IGNORE] * len(part)
    assert list(build_conversation([system("Be kind"), *TALK], format)) == [(ids, labels)]


def test_a_conversation_is_one_example_with_the_ids_of_each_served_turn(format: ChatFormat) -> None:
    [(ids, labels)] = build_conversation(TALK, format)
    check_mask(ids, labels, format, several_answers=True)
    spans = answer_spans(labels)
    for (start, end), place in zip(spans, (1, 5), strict=True):
        assert tuple(ids[:start]) == format.prompt_ids(TALK[:place])
        assert tuple(ids[start:end]) == format.target_ids(TALK[:place], TALK[place]["content"])
    with pytest.raises(InputError, match="labels equal the input ids from the target on"):
        check_mask(ids, labels, format)
    (start, end), broken = spans[0], list(labels)
    broken[start] = IGNORE
    with pytest.raises(InputError, match="first target token inside the loss: labels begin at"):
        check_mask(ids, broken, format, several_answers=True)
    with pytest.raises(InputError, match="end-of-turn inside the loss and last"):
        check_mask(ids, [*labels[: end - 1], IGNORE, *labels[end:]], format, several_answers=True)


def test_a_template_that_writes_earlier_answers_differently_gets_an_example_for_each() -> None:
    format = format_of("thinking")
    examples = list(build_conversation(TALK, format))
    assert len(examples) == 2
    for (ids, labels), place in zip(examples, (1, 5), strict=True):
        check_mask(ids, labels, format)
        assert tuple(ids) == (
            *format.prompt_ids(TALK[:place]),
            *format.target_ids(TALK[:place], TALK[place]["content"]),
        )


def test_a_conversation_without_an_answer_is_refused(format: ChatFormat) -> None:
    with pytest.raises(InputError, match="no answer to learn"):
        list(build_conversation([user("Hello there"), assistant(" ")], format))
