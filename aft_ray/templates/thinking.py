"""Thinking is not the answer: splits a model's text into what it thought and what it answers.

    split_thinking("<think>\\n6 x 7 is 42.\\n</think>\\n\\nIt is 42.")   ->   ("6 x 7 is 42.", "It is 42.")

Reasoning models write their thinking in tags before the answer. A chat template may have written the opening tag into
the prompt, so that the text begins inside; an answer that was cut may never leave its thinking. Tags in the middle of
an answer are text: it may be about them.
"""

from __future__ import annotations

import re

_NAMES = r"(?:think|thinking|thought|reasoning|reason|seed:think)"
_OPEN = re.compile(rf"\s*(?:<{_NAMES}>|\[THINK\]|◁think▷)", re.IGNORECASE)
_CLOSE = re.compile(rf"(?<!`)(?:</{_NAMES}>|\[/THINK\]|◁/think▷)(?!`)", re.IGNORECASE)
_ANY_OPEN = re.compile(_OPEN.pattern.removeprefix(r"\s*"), re.IGNORECASE)
_OPENED_LAST = re.compile(rf"({_ANY_OPEN.pattern})\s*$", re.IGNORECASE)


def split_thinking(text: str) -> tuple[str, str]:
    """Return (thinking, answer), both without the tags and without white space around them.

    Without any thinking the answer is the text as it is.
    """
    thoughts: list[str] = []
    rest = text
    while opened := _OPEN.match(rest):
        closed = _CLOSE.search(rest, opened.end())
        thoughts.append(rest[opened.end() : closed.start() if closed else len(rest)].strip())
        rest = rest[closed.end() :] if closed else ""
    if not thoughts:
        closed = _CLOSE.search(rest)
        if closed is None or _ANY_OPEN.search(rest, 0, closed.start()):
            return "", text
        thoughts, rest = [rest[: closed.start()].strip()], rest[closed.end() :]
    return "\n\n".join(filter(None, thoughts)), rest.strip()


def closing_of(prompt: str) -> str:
    """Return what ends the thought that a prompt opens at its end, without having thought; empty where it opens none.

    >>> closing_of("<|Assistant|><think>\\n")
    '\\n</think>\\n\\n'
    """
    opened = _OPENED_LAST.search(prompt)
    if opened is None:
        return ""
    mark = opened.group(1)
    return f"\n{mark[0]}/{mark[1:]}\n\n"


def with_thinking(thinking: str, answer: str) -> str:
    """Return an answer with its thinking before it, as reasoning models write it; the answer alone without any."""
    return f"<think>\n{thinking}\n</think>\n\n{answer}" if thinking else answer
