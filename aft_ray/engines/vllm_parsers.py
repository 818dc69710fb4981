"""vLLM's parsers of what a model writes: thinking told from the answer, tool calls read from it.

    parsers = VllmParsers(reasoning_parser="qwen3", tool_parser="hermes", tokenizer=..., model_config=...)
    asked = parsers.asked(request)            # None where this request needs no parser
    reader = asked.reader()                   # one per sample
    delta = reader.read(delta, ids, is_last)  # "<think>7 is odd</think>No" -> reasoning "7 is odd", text "No"

The same reader serves streams and whole answers, so a streamed answer adds up to the plain one. What has to be decided
before the answer is written, such as the grammar of a call that must come, is decided by vLLM's `adjust_request`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from aft_ray.engines.base import CallPiece, GenerateRequest, TokenDelta
from aft_ray.errors import InputError


class VllmParsers:
    """The parsers of one engine."""

    def __init__(self, *, reasoning_parser: str | None, tool_parser: str | None, tokenizer: Any, model_config: Any):
        from vllm.parser import ParserManager

        self.parser_class = ParserManager.get_parser(
            tool_parser_name=tool_parser,
            reasoning_parser_name=reasoning_parser,
            enable_auto_tools=tool_parser is not None,
            model_name=model_config.model,
            is_harmony=model_config.hf_config.model_type == "gpt_oss",
        )
        self.splits_thinking = reasoning_parser is not None
        self.tokenizer = tokenizer
        self.model_config = model_config

    def asked(self, request: GenerateRequest) -> AskedParser | None:
        """Return what reads the answers to a request. Raises InputError for tools that vLLM refuses."""
        if self.parser_class is None or not (self.splits_thinking or request.tool_use):
            return None
        return AskedParser(self, request)


class AskedParser:
    """What one request asks of the parsers, in the form of vLLM's own chat request."""

    def __init__(self, parsers: VllmParsers, request: GenerateRequest) -> None:
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        body: dict[str, Any] = {
            "messages": [{"role": message["role"], "content": message["content"]} for message in request.messages],
            "chat_template_kwargs": dict(request.template_arguments) or None,
        }
        if request.tool_use is not None:
            choice = request.tool_use.choice
            body |= {
                "tools": [dict(tool) for tool in request.tool_use.tools],
                "tool_choice": choice if isinstance(choice, str) else dict(choice),
            }
        try:
            asked = ChatCompletionRequest.model_validate(body)
        except ValidationError as error:
            raise InputError(f"tools: {error.errors()[0]['msg']}") from None
        self._parsers = parsers
        self._is_parallel = request.tool_use is None or request.tool_use.is_parallel
        self._prompt_end = _after_last(request.prompt_ids, request.stop_ids)
        self.request = self._parser(asked).adjust_request(asked)

    def _parser(self, asked: Any) -> Any:
        parsers = self._parsers
        assert parsers.parser_class is not None
        return parsers.parser_class(
            parsers.tokenizer,
            asked.tools,
            model_config=parsers.model_config,
            chat_template_kwargs=asked.chat_template_kwargs,
        )

    @property
    def structured_outputs(self) -> Any:
        """The grammar that a call which must come is written in; None where the model decides."""
        return self.request.structured_outputs

    @property
    def skips_special_tokens(self) -> bool:
        """Whether the text may come without special tokens, which some models mark their calls with."""
        return bool(self.request.skip_special_tokens)

    def reader(self) -> AnswerReader:
        return AnswerReader(
            self._parser(self.request), self.request, list(self._prompt_end), is_parallel=self._is_parallel
        )


@dataclass
class AnswerReader:
    """Reads one answer, piece by piece."""

    parser: Any
    request: Any
    prompt_end: list[int]
    """The ids after the last turn of the prompt: a template may have opened, or closed, the thinking there."""
    is_parallel: bool
    has_thought: bool = False
    has_text: bool = False

    def read(self, delta: TokenDelta, ids: Sequence[int], *, is_last: bool) -> TokenDelta:
        """Return a piece of the text as a piece of answer, thinking and tool calls."""
        found = self.parser.parse_delta(
            delta.text, list(ids), self.request, prompt_token_ids=self.prompt_end, finished=is_last
        )
        if found is None:
            return replace(delta, text="")
        text, reasoning = found.content or "", found.reasoning or ""
        if not self.has_thought:
            reasoning = reasoning.lstrip("\n")
        self.has_thought = self.has_thought or bool(reasoning)
        if self.parser.reasoning_parser is not None and not self.has_text:
            text = text.lstrip("\n")  # templates put line breaks between the end of the thinking and the answer
        self.has_text = self.has_text or bool(text)
        calls = [_piece(call) for call in found.tool_calls if self.is_parallel or call.index == 0]
        return replace(delta, text=text, reasoning=reasoning, tool_calls=tuple(calls))

    def num_reasoning_tokens(self, ids: Sequence[int]) -> int:
        return int(self.parser.count_reasoning_tokens(list(ids)))


def _piece(call: Any) -> CallPiece:
    name = call.function.name if call.function is not None else None
    return CallPiece(
        index=call.index,
        id=call.id or (f"call_{uuid.uuid4().hex[:24]}" if name else None),
        name=name,
        arguments=(call.function.arguments or "") if call.function is not None else "",
    )


def _after_last(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    """Return the ids after the last one that ends a turn: all of them where none does."""
    last = next((position for position in range(len(ids) - 1, -1, -1) if ids[position] in ends), -1)
    return ids[last + 1 :]
