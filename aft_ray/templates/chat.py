"""Chat template or in-context prompt -> token ids, once.

    format = ChatFormat.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    prompt = format.prompt_ids(messages)             # <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n
    target = format.target_ids(messages, "Paris.")   # Paris.<|im_end|>

The same two calls make the training examples and the prompts that are served, so what is trained is what is sent:

    prompt_ids + target_ids  ==  ids of the rendered full conversation, up to and including its end-of-turn token

Text after the end-of-turn token (ChatML's line break) belongs to the template, not to the target. If the tokenizer adds
a BOS, the prompt has exactly one: from the template's text where that begins with it, else in front of it. Where a
template refuses or drops a system message (Mistral, Gemma), its text goes to the top of the first user message. A
tokenizer without a chat template uses the in-context prompt.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aft_ray.errors import ConfigError, InputError
from aft_ray.models import load_tokenizer
from aft_ray.records import Message, ToolCall
from aft_ray.templates.control import ControlTokens
from aft_ray.templates.families import FAMILIES, arguments_of, template_text
from aft_ray.templates.format import checked
from aft_ray.templates.in_context import InContextPrompt
from aft_ray.templates.thinking import closing_of
from aft_ray.templates.turns import (
    in_parts,
    name_as_text,
    neutralised,
    neutralised_value,
    tools_as_text,
    with_arguments_as,
)

Style = Literal["auto", "chat", "in_context"]
"""`auto` uses the chat template where the tokenizer has one of its own, else the in-context prompt."""

_PROBE = "Zebra"
_PROBES = (_PROBE, "7", "e.", "z\n")  # different endings, so what all prompts end with comes from the template


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """What a chat template writes around an answer, besides its generation prompt."""

    before: str = ""
    after: str = ""
    """Text after the answer, up to and including the end-of-turn token where there is one."""
    end: str | None = None
    """The end-of-turn token; None where the template writes none."""


class ChatFormat:
    """A tokenizer with its chat template, or with the in-context prompt. Implements `PromptFormat`."""

    def __init__(self, tokenizer: Any, in_context: InContextPrompt | None = None, style: Style = "auto") -> None:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if style == "chat" and template is None:
            raise ConfigError(
                f"the tokenizer {getattr(tokenizer, 'name_or_path', '')} has no chat template: set its engine's "
                f"chat_template ({', '.join(FAMILIES)}, or the path of a Jinja file), or use an instruct model. The "
                "in-context prompt samples proposals only, and is never what is trained or served"
            )
        self.tokenizer = tokenizer
        self.has_template = template is not None and style != "in_context"
        self._template = template if self.has_template else None
        self._in_context = None if self.has_template else in_context or InContextPrompt.load()
        self._controls = ControlTokens.of(tokenizer, self._template)
        self._in_parts = False
        self._adds_bos = _adds_bos(tokenizer)
        self.template_arguments = frozenset() if template is None else arguments_of(template, tokenizer)
        self._tools: tuple[Any, ...] = ()
        self._arguments: Mapping[str, Any] = {}
        self._in_parts = self._takes_parts()
        self._merges_system = self.has_template and not self._keeps_system()
        self._keeps_names = self._writes_names()
        self._arguments_type = self._type_of_arguments()
        self.takes_tools = self._writes_tools()
        self._turn = self._probe_turn()
        self.bos_id, self.prompt_tail = self._probe_prompt()

    @classmethod
    def load(
        cls,
        tokenizer_source: str,
        in_context: InContextPrompt | None = None,
        style: Style = "auto",
        trust_remote_code: bool = False,
        chat_template: str | None = None,
    ) -> ChatFormat:
        """Load a tokenizer from a folder or a hub id. Raises ConfigError where there is none.

        `chat_template` replaces the tokenizer's own. Where it has none, only style `chat` uses it: `auto` prompts the
        model in context, as one that has not been taught the template.
        """
        try:
            tokenizer = load_tokenizer(tokenizer_source, trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tokenizer {tokenizer_source}: cannot be loaded ({error})") from error
        if chat_template is not None and (style == "chat" or tokenizer.chat_template):
            tokenizer.chat_template = template_text(chat_template)
        return cls(tokenizer, in_context, style)

    @property
    def template_hash(self) -> str:
        if self._in_context is not None:
            return self._in_context.hash
        assert self._template is not None
        return hashlib.sha256(self._template.encode()).hexdigest()

    @property
    def end_of_turn_id(self) -> int | None:
        """Id of the token that ends an answer: the template's, else the tokenizer's eos; None where it has neither."""
        return self._controls.ids[self._turn.end] if self._turn.end else self.tokenizer.eos_token_id

    @property
    def stop_ids(self) -> tuple[int, ...]:
        ids = (self.end_of_turn_id, self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(index for index in ids if index is not None))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._in_context.stop_strings if self._in_context is not None else ()

    @functools.cached_property
    def vocabulary_size(self) -> int | None:
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1  # `len` is too small where ids have gaps

    def rendering(self, tools: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> ChatFormat:
        if not tools and not arguments:
            return self
        chat = copy.copy(self)
        chat._tools = tuple(neutralised_value(tool, self.neutralise) for tool in tools)
        known = {name: value for name, value in arguments.items() if name in self.template_arguments}
        chat._arguments = neutralised_value(known, self.neutralise)
        return chat

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._ids(self._prompt_text(messages))

    def text_ids(self, text: str) -> tuple[int, ...]:
        return self._ids(text)

    def target_ids(self, messages: Sequence[Message], target: str) -> tuple[int, ...]:
        """Return what an answer adds to the prompt's ids; it is tokenized alone where the two would share a token."""
        if self.end_of_turn_id is None:
            raise ConfigError("a target must end, but the tokenizer has neither an end-of-turn nor an eos token")
        prompt, added = self._prompt_text(messages), self._added_text(messages, target)
        prompt_ids, full_ids = self._ids(prompt), self._ids(prompt + added)
        same = full_ids[: len(prompt_ids)] == prompt_ids
        ids = full_ids[len(prompt_ids) :] if same else self._raw_ids(added)
        return ids if self._turn.end else (*ids, self.end_of_turn_id)

    def count(self, messages: Sequence[Message]) -> int:
        return len(self.prompt_ids(messages))

    def num_tokens(self, text: str) -> int:
        return len(self._raw_ids(self.neutralise(text)))

    def cut(self, text: str, max_tokens: int) -> str:
        """Cut `text` at a token boundary that is also a character boundary, and strip white space at its end."""
        if max_tokens <= 0:
            return ""
        text = self.neutralise(text)
        if not getattr(self.tokenizer, "is_fast", False):
            ids = self._raw_ids(text)
            return text if len(ids) <= max_tokens else self.decode(ids[:max_tokens]).rstrip("\ufffd \n")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        return text if len(offsets) <= max_tokens else text[: offsets[max_tokens][0]].rstrip()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def neutralise(self, text: str) -> str:
        text = self._controls.neutralise(text)
        return text if self._in_context is None else self._in_context.neutralise(text)

    # ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        prepared = self._prepared(messages)
        if self._in_context is not None:
            return self._in_context.render(prepared)
        return self._rendered(prepared, generation_prompt=True)

    def _added_text(self, messages: Sequence[Message], target: str) -> str:
        """Return what the answer adds to the prompt's text, up to and including its end-of-turn token.

        The whole conversation is rendered first, because a template may write something before the answer or trim it.
        Where the result does not begin with the prompt (Mistral v0.3 moves the system text, some reasoning templates
        drop the thought that the prompt opened), the answer is put between what the template writes around answers
        elsewhere, after the end of such a thought.
        """
        if self._in_context is not None:
            return self.neutralise(target) + self._in_context.closing
        prompt = self._prompt_text(messages)
        answer = Message(role="assistant", content=target)
        full = self._rendered(self._prepared([*messages, answer]), generation_prompt=False)
        turn = self._turn
        if not full.startswith(prompt):
            return turn.before + self.neutralise(target) + (turn.after if turn.end else "")
        added = full[len(prompt) :]
        if turn.end is None:
            return added.removesuffix(turn.after)
        end = added.find(turn.end)
        return added[: end + len(turn.end)] if end >= 0 else added + turn.end

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages neutralised, and say as text what the template has no place for."""
        checked(messages)
        clean = [neutralised(message, self.neutralise) for message in messages]
        if any("tool_calls" in message for message in clean) and self._arguments_type is None:
            clean = tools_as_text(clean)
        if any("name" in message for message in clean) and not self._keeps_names:
            clean = [name_as_text(message) for message in clean]
        return _system_in_user(clean) if self._merges_system else clean

    def _rendered(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        kind = self._arguments_type if any("tool_calls" in message for message in messages) else None
        return self._filled([with_arguments_as(kind or str, message) for message in messages], generation_prompt)

    def _filled(self, turns: list[dict[str, Any]], generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                [in_parts(turn) for turn in turns] if self._in_parts else turns,
                tools=list(self._tools) or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._arguments,
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(
                f"the model's chat template refuses a conversation with the roles {roles}: {error}"
            ) from error
        for turn in turns:
            if turn["role"] in ("developer", "tool") and not _holds(text, turn["content"]):
                raise InputError(f"the model's chat template leaves out a message with the role {turn['role']}")
        return text

    # ── ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self._raw_ids(text)
        bos = self.tokenizer.bos_token_id
        return (bos, *ids) if self._adds_bos and ids[:1] != (bos,) else ids

    def _raw_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # ── what the template does, asked once ───────────────────────────────────────────────────────────────────────────

    def _takes_parts(self) -> bool:
        """Whether the template takes a message's text as a list of parts, as those of multimodal models do.

        Raises ConfigError for one that shows a text in neither form.
        """
        if self._in_context is not None:
            return False
        for self._in_parts in (False, True):
            if self._shows([{"role": "user", "content": _PROBE}], [_PROBE]):
                return self._in_parts
        raise ConfigError(
            f"the chat template of the tokenizer {getattr(self.tokenizer, 'name_or_path', '')} leaves out the text of "
            f"messages: set its engine's chat_template ({', '.join(FAMILIES)}, or the path of a Jinja file)"
        )

    def _keeps_system(self) -> bool:
        conversation = [Message(role="system", content=_PROBE), Message(role="user", content="7")]
        try:
            return _PROBE in self._rendered(conversation, generation_prompt=True)
        except InputError:
            return False

    def _writes_names(self) -> bool:
        """Whether the template writes the name of whoever speaks."""
        return self._shows([{"role": "user", "name": _PROBE, "content": "7"}], [_PROBE])

    def _writes_tools(self) -> bool:
        """Whether the template describes the tools that an answer may call."""
        function = {"name": _PROBE, "description": "17", "parameters": {"type": "object", "properties": {}}}
        chat = self.rendering([{"type": "function", "function": function}], {})
        return chat._shows([{"role": "user", "content": "7"}], [_PROBE, "17"])

    def _type_of_arguments(self) -> type[dict[str, Any]] | type[str] | None:
        """Return how the template takes the arguments of tool calls; None where it does not write calls and results."""
        call: ToolCall = {"id": "zebracall", "type": "function", "function": {"name": _PROBE, "arguments": '{"a": 17}'}}
        conversation = [
            Message(role="user", content="7"),
            Message(role="assistant", content="", tool_calls=[call]),
            Message(role="tool", content="striped", name=_PROBE, tool_call_id="zebracall"),
        ]
        kinds: tuple[type[dict[str, Any]] | type[str], ...] = (dict, str)
        for kind in kinds:
            if self._shows([with_arguments_as(kind, message) for message in conversation], [_PROBE, "17", "striped"]):
                return kind
        return None

    def _shows(self, turns: list[dict[str, Any]], probes: Sequence[str]) -> bool:
        if self._in_context is not None:
            return False
        try:
            text = self._filled(turns, generation_prompt=True)
        except (InputError, TypeError):  # a template that joins a dict to text raises the latter
            return False
        return all(probe in text for probe in probes)

    def _probe_turn(self) -> _Turn:
        if self._in_context is not None:
            return _Turn(after=self._in_context.closing)
        query, answer = Message(role="user", content="7"), Message(role="assistant", content=_PROBE)
        full = self._rendered([query, answer], generation_prompt=False)
        head, _, after = full.rpartition(_PROBE)
        prompt = self._rendered([query], generation_prompt=True)
        before = head[len(prompt) :] if head.startswith(prompt) else closing_of(prompt)
        end = self._controls.first_in(after)
        return _Turn(before=before, after=after if end is None else after[: after.index(end) + len(end)], end=end)

    def _probe_prompt(self) -> tuple[int | None, tuple[int, ...]]:
        """Return the BOS that begins every prompt (None if it also marks turns) and the ids that end every prompt."""
        prompts = [self.prompt_ids([Message(role="user", content=probe)]) for probe in _PROBES]
        tail = prompts[0]
        for prompt in prompts[1:]:
            tail = _common_suffix(tail, prompt)
        bos = self.tokenizer.bos_token_id
        return (bos if all(prompt[:1] == (bos,) and prompt.count(bos) == 1 for prompt in prompts) else None), tail


def _holds(text: str, content: str) -> bool:
    """Return whether a rendered conversation holds the text of a message, as it is or as JSON."""
    content = content.strip()
    return content in text or json.dumps(content)[1:-1] in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _system_in_user(messages: list[Message]) -> list[Message]:
    """Put a leading system message at the top of the first user message, or make it one where there is none."""
    if messages[0]["role"] != "system":
        return messages
    text, rest = messages[0]["content"], messages[1:]
    if not rest or rest[0]["role"] != "user":
        return [Message(role="user", content=text), *rest]
    first = rest[0].copy()
    first["content"] = f"{text}\n\n{first['content']}"
    return [first, *rest[1:]]


def _common_suffix(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    length = 0
    while length < min(len(left), len(right)) and left[-1 - length] == right[-1 - length]:
        length += 1
    return left[len(left) - length :]
