"""Text is data: nothing inside a message may act as a control token of the model.

If a user or a proposal writes `<|im_end|>`, that must not end a turn. Every such string is broken by a zero-width space
(U+200B) after its first character: a reader sees the same text, and the tokenizer sees ordinary characters.

    ControlTokens.of(tokenizer, template).neutralise("stop <|im_end|>")   ->   "stop <\\u200b|im_end|>"

Control strings are: the tokenizer's special tokens; those of its other added tokens that are markup (`<think>`, but
neither the extra words of an extended vocabulary nor Gemma's HTML tags, which answers about HTML need); `<|...|>`
strings in the text of the chat template, whether they are tokens or not; and the marks of Llama-2 and Mistral.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

BREAK = "\u200b"
REPLACEMENT = "\ufffd"
LITERAL_MARKUP = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

_MARKUP_CHARACTER = re.compile(r"[<>\[\]{}|｜]")
_TEMPLATE_MARKUP = re.compile(r"<\|[^\s|<>{}]+\|>")
_HTML_TAG = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|code|sub|sup|p|br|ul|ol|li)>"
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which cut JSON escapes leave and UTF-8 cannot encode, by U+FFFD."""
    return _SURROGATE.sub(REPLACEMENT, text)


def break_strings(strings: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern for the first character of every occurrence of `strings`; None without strings.

    It consumes one character only, so it finds overlapping occurrences too, in `<s><s>` or in a run of six backticks.
    """
    rests: dict[str, list[str]] = {}
    for string in sorted({s for s in strings if len(s) > 1}, key=lambda s: (-len(s), s)):
        rests.setdefault(string[0], []).append(re.escape(string[1:]))
    parts = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in sorted(rests.items())]
    return re.compile("|".join(parts)) if parts else None


def broken(text: str, pattern: re.Pattern[str] | None) -> str:
    """Return `text` with U+200B after every match. Patterns must consume only the beginning of what they look for."""
    return pattern.sub(lambda match: match.group() + BREAK, text) if pattern is not None else text


class ControlTokens:
    """The control strings of one tokenizer and chat template."""

    def __init__(self, ids: dict[str, int], literals: Iterable[str], tokenizer: Any = None) -> None:
        self.ids = ids
        """Control string -> token id."""
        self._pattern = break_strings([*ids, *literals])
        # a single character cannot be broken, only replaced
        self._single = {ord(string): REPLACEMENT for string in ids if len(string) == 1}
        self._tokenizer = tokenizer if _normalises(tokenizer) else None
        self._guarded = set(ids.values()) - {getattr(tokenizer, "unk_token_id", None)}

    @classmethod
    def of(cls, tokenizer: Any, template: str | None) -> ControlTokens:
        """Return the control strings of a Hugging Face tokenizer used with `template` (None: no chat template)."""
        always = set(tokenizer.all_special_tokens)
        added = {token.content: (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        ids = {
            content: int(index)
            for content, (index, token) in added.items()
            if content.strip() and (token.special or content in always or _is_markup(content))
        }
        return cls(ids, [*LITERAL_MARKUP, *_TEMPLATE_MARKUP.findall(template or "")], tokenizer)

    def neutralise(self, text: str) -> str:
        """Return `text` without any control string. Other text is unchanged."""
        text = broken(without_surrogates(text).translate(self._single), self._pattern)
        return self._replace_rest(text) if self._tokenizer is not None else text

    def first_in(self, text: str) -> str | None:
        """Return the first control token in `text`: the longest, where two begin at the same place."""
        found = [(text.find(string), -len(string), string) for string in self.ids if string in text]
        return min(found)[2] if found else None

    def _replace_rest(self, text: str) -> str:
        """Overwrite what still becomes a control id: a normaliser may remove the break, or turn `＜s＞` into `<s>`.

        Every pass overwrites at least one more character, so this ends.
        """
        assert self._tokenizer is not None
        while True:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            hits = [span for index, span in pairs if index in self._guarded]
            spans = [(start, end) for start, end in hits if text[start:end].strip(REPLACEMENT)]
            if not spans:
                return text
            for start, end in reversed(spans):
                text = text[:start] + REPLACEMENT + text[end:]


def _is_markup(content: str) -> bool:
    return bool(_MARKUP_CHARACTER.search(content)) and not _HTML_TAG.fullmatch(content)


def _normalises(tokenizer: Any) -> bool:
    """Whether the tokenizer changes text before it splits it (lower case, NFKC, ...)."""
    return getattr(tokenizer, "is_fast", False) and tokenizer.backend_tokenizer.normalizer is not None
