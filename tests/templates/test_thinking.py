"""Thinking is told apart from the answer, and an answer about tags is left alone."""

from __future__ import annotations

import pytest

from aft_ray.templates.thinking import split_thinking, with_thinking

SPLIT = {
    "in tags": ("<think>\nDraft 1 is wrong.\n</think>\n\nAnswer 94", "Draft 1 is wrong.", "Answer 94"),
    "unclosed": ("<think>\nDraft 1 is wrong. So", "Draft 1 is wrong. So", ""),
    "without the opening tag": ("Draft 1 is wrong.\n</think>\n\nAnswer 94", "Draft 1 is wrong.", "Answer 94"),
    "empty tags": ("<think>\n\n</think>\n\nAnswer 94", "", "Answer 94"),
    "twice": ("<think>a</think>\n<think>b</think>Answer", "a\n\nb", "Answer"),
    "another name": ("<thinking>a</thinking>Answer", "a", "Answer"),
    "Magistral": ("[THINK]a[/THINK]Answer", "a", "Answer"),
    "Seed": ("<seed:think>a</seed:think>Answer", "a", "Answer"),
    "a tag within": ("<think>is </b> a tag?</think>\nYes", "is </b> a tag?", "Yes"),
    "none": ("  Answer 94 ", "", "  Answer 94 "),
    "an answer about tags": ("Models write <think> and </think> around it.", "", None),
    "a tag quoted": ("End your thoughts with `</think>`.", "", None),
    "empty": ("", "", ""),
}


@pytest.mark.parametrize(("text", "thinking", "answer"), SPLIT.values(), ids=SPLIT)
def test_thinking_is_split_from_the_answer(text: str, thinking: str, answer: str | None) -> None:
    assert split_thinking(text) == (thinking, text if answer is None else answer)


def test_thinking_that_is_written_can_be_split_again() -> None:
    assert split_thinking(with_thinking("a\nb", "Answer")) == ("a\nb", "Answer")
    assert with_thinking("", "Answer") == "Answer"
