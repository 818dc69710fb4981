"""Small tokenizers of the known chat-template families, made here: byte-level BPE with a dozen whole words.

Ids: 0-255 the byte alphabet in sorted order, then the words in the order of `WORDS` with the pieces they are merged
from, then the control tokens. Nothing is trained, so the golden ids depend on this file alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from aft_ray.records import Message
from aft_ray.templates import ChatFormat

WORDS = ["system", "user", "assistant", "model", "Be", "Ġkind", "Hello", "Ġthere", "Good", "Ġday", "Draft", "ĠINST"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (  # its turn marks are no tokens, and it leaves the BOS to the tokenizer
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LATE_SYSTEM = (  # Mistral v0.3: the system text stands in the last user turn, and only while that is the last message
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # Qwen3: the last answer begins with an empty thought, which the generation prompt does not have
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPEN_THOUGHT = (  # R1: the generation prompt opens a thought, and earlier answers are shown without theirs
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
PARTS = (  # SmolVLM: content is a list of parts; a text that is no list would be left out
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (  # no control tokens at all
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

S_PAIR = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
FAMILIES: dict[str, dict[str, Any]] = {
    "chatml": dict(template=CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra=["<|im_start|>"]),
    "llama3": dict(
        template=LLAMA3,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        extra=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        adds_bos=True,
    ),
    "mistral": dict(template=MISTRAL, **S_PAIR, adds_bos=True),
    "gemma": dict(
        template=GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
        extra=["<start_of_turn>", "<end_of_turn>"],
        ordinary=["<table>", "</table>", "\n\n"],
        adds_bos=True,
    ),
    "zephyr": dict(template=ZEPHYR, **S_PAIR, adds_bos=True),
    "late_system": dict(template=LATE_SYSTEM, **S_PAIR, extra=["[INST]", "[/INST]"], adds_bos=True),
    "thinking": dict(
        template=THINKING,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra=["<|im_start|>"],
        ordinary=["<think>", "</think>"],
    ),
    "open_thought": dict(
        template=OPEN_THOUGHT,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra=["<|im_start|>"],
        ordinary=["<think>", "</think>"],
    ),
    "parts": dict(template=PARTS, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra=["<|im_start|>"]),
    "plain": dict(template=PLAIN, **S_PAIR, adds_bos=True),
    "base": dict(template=None, bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
    "base_with_bos": dict(template=None, **S_PAIR, adds_bos=True),
}
CHAT_FAMILIES = ["chatml", "llama3", "mistral", "gemma", "zephyr"]


@cache
def make_tokenizer(family: str) -> Any:
    """Return a Hugging Face tokenizer of the family. It is shared, so callers must not change it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    knobs = dict(FAMILIES[family])
    template, adds_bos = knobs.pop("template"), knobs.pop("adds_bos", False)
    extra, ordinary = knobs.pop("extra", []), knobs.pop("ordinary", [])
    core = Tokenizer(models.BPE(*_vocab_and_merges()))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*dict.fromkeys(knobs.values()), *extra])
    core.add_tokens(ordinary)
    if adds_bos:
        _add_bos(core, knobs["bos_token"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **knobs)
    tokenizer.chat_template = template
    return tokenizer


def _vocab_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import pre_tokenizers

    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    return vocab, merges


def _add_bos(core: Any, bos: str) -> None:
    from tokenizers import processors

    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
    )


@cache
def format_of(family: str) -> ChatFormat:
    """`format_of("llama3")`: the format of a family."""
    return ChatFormat(make_tokenizer(family))


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


# Every family takes it: no system message, roles alternate. Braces, tags and fences are ordinary text.
CONVERSATION = [user("Hello there"), assistant("Good day"), user("Be kind <b>{x}</b> 3 < 4 | [a] `é`")]
