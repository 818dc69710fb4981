"""The loss mask: a built example passes the check, and the check names every way of breaking it."""

from __future__ import annotations

import pytest
from families import CONVERSATION, FAMILIES, format_of, user

from aft_ray.errors import InputError
from aft_ray.templates import IGNORE, AggregatorTemplate, ChatFormat, build_example, check_mask


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
