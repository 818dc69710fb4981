"""The loss mask: the model learns to write the answer and its end-of-turn token, never the prompt.

input_ids   [ prompt ......................... | target ......... end-of-turn ]
labels      [ IGNORE IGNORE IGNORE ... IGNORE  | target ......... end-of-turn ]

Of a conversation, every answer may be a target (`build_conversation`). Each then follows exactly the ids after which it
is served, so a turn joins the example of the turn before it only where its prompt continues that one's ids:

input_ids   [ prompt 1 ...... | answer 1 | prompt 2, from where answer 1 ends | answer 2 ]
labels      [ IGNORE ........ | answer 1 | IGNORE ........................... | answer 2 ]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aft_ray.errors import InputError
from aft_ray.records import Message
from aft_ray.templates.chat import ChatFormat

IGNORE = -100
"""The label that torch's cross entropy ignores."""


def build_example(prompt_ids: Sequence[int], target_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return (input_ids, labels) of one training example. Raises InputError when either part is empty."""
    if not prompt_ids or not target_ids:
        raise InputError(
            f"a training example needs a prompt and a target, found {len(prompt_ids)} and {len(target_ids)} tokens"
        )
    return [*prompt_ids, *target_ids], [IGNORE] * len(prompt_ids) + list(target_ids)


def build_conversation(messages: Sequence[Message], format: ChatFormat) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the examples (input_ids, labels) that have every answer of a conversation in the loss, each answer once.

    One example, unless the template writes an earlier answer in another way than the last one, as those do that drop
    its thinking: then the turn after it begins an example of its own.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"].strip() or not place:
            continue
        prompt = list(format.prompt_ids(messages[:place]))
        target = list(format.target_ids(messages[:place], message["content"]))
        if input_ids and prompt[: len(input_ids)] != input_ids:
            yield input_ids, labels
            labels = []
        labels = [*labels, *[IGNORE] * (len(prompt) - len(labels)), *target]
        input_ids = [*prompt, *target]
    if not input_ids:
        raise InputError("the conversation has no answer to learn")
    yield input_ids, labels


def answer_spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Return where each target begins and ends.

    >>> answer_spans([-100, -100, 7, 8, -100, 9])
    [(2, 4), (5, 6)]
    """
    spans: list[tuple[int, int]] = []
    for place, label in enumerate(labels):
        if label == IGNORE:
            continue
        if spans and spans[-1][1] == place:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            spans.append((place, place + 1))
    return spans


def check_mask(
    input_ids: Sequence[int], labels: Sequence[int], format: ChatFormat, several_answers: bool = False
) -> None:
    """Raise InputError, naming the invariant, if an example of `format` breaks one.

    With `several_answers`, all that is in the loss before the last target must be whole answers, too.
    """
    if several_answers:
        for start, end in answer_spans(labels)[:-1]:
            _check_boundary(input_ids[:end], start, format)
            _check_end(input_ids[:end], labels[:end], start, format)
        last = answer_spans(labels)[-1:]
        labels = [IGNORE] * last[0][0] + list(labels[last[0][0] :]) if last else labels
    start = _target_start(input_ids, labels)
    _check_boundary(input_ids, start, format)
    _check_end(input_ids, labels, start, format)
    _check_bos(input_ids, format)


def _target_start(input_ids: Sequence[int], labels: Sequence[int]) -> int:
    """Return where the target begins: labels are IGNORE before it and equal the input ids from there on."""
    if len(input_ids) != len(labels):
        raise InputError(f"expected one label per token, found {len(input_ids)} input_ids and {len(labels)} labels")
    start = next((place for place, label in enumerate(labels) if label != IGNORE), len(labels))
    if start == len(labels):
        raise InputError(f"first target token inside the loss: all {len(labels)} labels are {IGNORE}")
    if start == 0:
        raise InputError("prompt outside the loss: the first label is a token, so there is no masked prompt")
    for place in range(start, len(labels)):
        if labels[place] != input_ids[place]:
            last = place == len(labels) - 1
            what = "end-of-turn inside the loss" if last else "labels equal the input ids from the target on"
            raise InputError(f"{what}: place {place} has id {input_ids[place]} and label {labels[place]}")
    return start


def _check_boundary(input_ids: Sequence[int], start: int, format: ChatFormat) -> None:
    """Check that the loss begins directly after the last generation prompt (`<|im_start|>assistant\\n`)."""
    tail = format.prompt_tail
    expected = _last_end_of(tail, input_ids, format)
    if expected is None or start == expected:
        return
    if start < expected:
        raise InputError(f"prompt outside the loss: labels begin at {start}, the target at {expected}")
    raise InputError(f"first target token inside the loss: labels begin at {start}, the target at {expected}")


def _last_end_of(tail: Sequence[int], input_ids: Sequence[int], format: ChatFormat) -> int | None:
    """Return where the last generation prompt ends; None if an answer could contain it, so its place proves nothing."""
    text = format.decode(tail)
    if not tail or format.neutralise(text) == text:
        return None
    for end in range(len(input_ids), len(tail) - 1, -1):
        if list(input_ids[end - len(tail) : end]) == list(tail):
            return end
    raise InputError(f"prompt ends with the generation prompt {text!r} (ids {list(tail)}): not found in the example")


def _check_end(input_ids: Sequence[int], labels: Sequence[int], start: int, format: ChatFormat) -> None:
    end = format.end_of_turn_id
    if labels[-1] != end:
        raise InputError(f"end-of-turn inside the loss and last: the last label is {labels[-1]}, expected {end}")
    if end in input_ids[start:-1]:
        raise InputError(f"end-of-turn inside the loss and last: the target contains id {end} before its end, too")


def _check_bos(input_ids: Sequence[int], format: ChatFormat) -> None:
    count = list(input_ids[:-1]).count(format.bos_id or 0)  # the last id may be a BOS that is the eos as well (OPT)
    if format.bos_id is not None and (input_ids[0] != format.bos_id or count != 1):
        raise InputError(f"exactly one BOS, in front: id {format.bos_id} occurs {count} times, first id {input_ids[0]}")
