"""Messages -> ids: golden ids per family, one BOS, and equal ids in training and serving."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from families import CHATML, CONVERSATION, FAMILIES, MISTRAL, S_PAIR, assistant, format_of, make_tokenizer, system, user

from aft_ray.errors import ConfigError, InputError
from aft_ray.records import Message
from aft_ray.templates import ChatFormat, InContextPrompt, MessagesFormat, PromptFormat

# system "Be kind", user "Hello there", target "Good day"; the tokens are spelt out in families.py.
GOLDEN = {
    "chatml": (
        (306, 260, 198, 276, 280, 304, 198, 306, 263, 198, 284, 289, 304, 198, 306, 271, 198),
        (292, 295, 304),
    ),
    "llama3": (
        (
            *(304, 306, 260, 307, 198, 198, 276, 280, 308),
            *(306, 263, 307, 198, 198, 284, 289, 308),
            *(306, 271, 307, 198, 198),
        ),
        (292, 295, 308),
    ),
    "mistral": (  # no system role: its text leads the first user message
        (304, 58, 40, 45, 50, 51, 60, 220, 276, 280, 198, 198, 284, 289, 220, 58, 14, 40, 45, 50, 51, 60),
        (292, 295, 305),
    ),
    "gemma": (  # no system role; "\n\n" is one token
        (304, 306, 263, 198, 276, 280, 310, 284, 289, 307, 198, 306, 275, 198),
        (292, 295, 307),
    ),
    "zephyr": (  # turn marks are text; the BOS comes from the tokenizer, not from the template
        (
            *(304, 27, 91, 260, 91, 29, 198, 276, 280, 305, 198),
            *(27, 91, 263, 91, 29, 198, 284, 289, 305, 198),
            *(27, 91, 271, 91, 29, 198),
        ),
        (292, 295, 305),
    ),
}


def test_a_prompt_and_its_target_have_the_familys_golden_ids(family: str, format: ChatFormat) -> None:
    messages = [system("Be kind"), user("Hello there")]
    prompt, target = GOLDEN[family]
    assert format.prompt_ids(messages) == prompt
    assert format.target_ids(messages, "Good day") == target


def test_ordinary_text_gets_the_ids_of_apply_chat_template(family: str, format: ChatFormat) -> None:
    tokenizer = make_tokenizer(family)
    expected = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, add_generation_prompt=True)["input_ids"]
    if family == "zephyr":  # its template leaves the BOS out, its tokenizer adds one
        expected = [tokenizer.bos_token_id, *expected]
    assert list(format.prompt_ids(CONVERSATION)) == expected


@pytest.mark.parametrize("family", [name for name in FAMILIES if make_tokenizer(name).bos_token and name != "base"])
def test_a_prompt_begins_with_exactly_one_bos(family: str) -> None:
    format, bos = format_of(family), make_tokenizer(family).bos_token_id
    ids = format.prompt_ids(CONVERSATION)
    assert ids[0] == bos == format.bos_id
    assert ids.count(bos) == 1


@pytest.mark.parametrize("family", ["chatml", "base"])
def test_a_tokenizer_that_adds_no_bos_gets_none(family: str) -> None:
    assert format_of(family).bos_id is None


def test_a_bos_that_also_marks_turns_is_not_counted_as_one() -> None:
    from transformers import PreTrainedTokenizerFast

    core = make_tokenizer("chatml").backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    assert ChatFormat(tokenizer).bos_id is None


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "gemma", "thinking", "plain"])
@pytest.mark.parametrize("target", ["Good day", "", " Good", "3 < 4\n\nBe kind  é 日本 😀"])
def test_prompt_and_target_are_the_ids_of_the_rendered_conversation(family: str, target: str) -> None:
    format, tokenizer = format_of(family), make_tokenizer(family)
    whole = [*CONVERSATION, assistant(target)]
    rendered = tokenizer.apply_chat_template(whole, tokenize=True)["input_ids"]
    trained = [*format.prompt_ids(CONVERSATION), *format.target_ids(CONVERSATION, target)]
    if family == "plain":  # neither BOS nor end-of-turn: the tokenizer's stand around what the template wrote
        assert (trained[0], trained[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        trained = trained[1:-1]
    assert trained == rendered[: len(trained)]
    assert format.decode(rendered[len(trained) :]).strip() == ""


def test_the_target_ends_with_the_end_of_turn_token_and_without_the_line_break_behind_it() -> None:
    ends = {
        "chatml": "<|im_end|>",
        "llama3": "<|eot_id|>",
        "mistral": "</s>",
        "gemma": "<end_of_turn>",
        "plain": "</s>",
    }
    for family, end in ends.items():
        format = format_of(family)
        assert format.decode(format.target_ids(CONVERSATION, "Good day")).endswith(f"Good day{end}")
        assert format.stop_ids[0] == format.end_of_turn_id == make_tokenizer(family).convert_tokens_to_ids(end)


def test_answers_stop_at_the_end_of_turn_and_at_eos() -> None:
    assert format_of("chatml").stop_ids == (304,)
    assert format_of("llama3").stop_ids == (308, 305)
    assert format_of("gemma").stop_ids == (307, 305)
    assert format_of("llama3").stop_strings == ()


def test_a_thought_that_the_template_puts_before_the_answer_belongs_to_the_target() -> None:
    format = format_of("thinking")
    assert format.decode(format.target_ids(CONVERSATION, "Good")) == "<think>\n\n</think>\n\nGood<|im_end|>"


def test_a_template_that_moves_the_system_text_still_gives_the_same_target() -> None:
    format = format_of("late_system")
    with_system = format.target_ids([system("Be kind"), user("Hello there")], "Good day")
    assert with_system == format.target_ids([user("Hello there")], "Good day") == (220, 292, 295, 305)


def test_where_prompt_and_answer_would_share_a_token_the_answer_is_tokenized_by_itself() -> None:
    format = format_of("gemma")  # its prompt ends with a line break, and two of them are one token
    assert format.target_ids(CONVERSATION, "Good") == (292, 307)
    tokenizer = make_tokenizer("gemma")
    untrimmed = tokenizer.chat_template.replace(" | trim", "")
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    other.chat_template = untrimmed
    assert ChatFormat(other).target_ids(CONVERSATION, "\nGood") == (198, 292, 307)


def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_before_the_answer() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "▁", *sorted(set("[INST] [/INST] Hello there Good day"))]
    core = Tokenizer(models.BPE({c: index for index, c in enumerate(characters)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # as Llama-2 and Mistral do
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **S_PAIR)
    tokenizer.chat_template = MISTRAL
    format = ChatFormat(tokenizer)
    target = format.target_ids([user("Hello there")], "Good")
    assert tokenizer.convert_ids_to_tokens(target) == ["G", "o", "o", "d", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("Good")["input_ids"]) == ["▁", "G", "o", "o", "d"]


@pytest.mark.parametrize("family", ["mistral", "gemma"])
def test_a_template_without_a_system_role_gets_the_system_text_in_the_first_user_message(family: str) -> None:
    format = format_of(family)
    merged = [user("Be kind\n\nHello there"), *CONVERSATION[1:]]
    assert format.prompt_ids([system("Be kind"), *CONVERSATION]) == format.prompt_ids(merged)
    assert format.prompt_ids([system("Be kind")]) == format.prompt_ids([user("Be kind")])


def test_a_conversation_the_template_refuses_is_an_input_error_with_the_templates_own_words() -> None:
    with pytest.raises(InputError, match=r"conversation with the roles user, user: .*must alternate"):
        format_of("mistral").prompt_ids([user("Hello"), user("there")])


def test_a_message_of_a_tool_or_developer_is_rendered_or_the_conversation_is_refused() -> None:
    messages = [user("2+2?"), assistant("I ask."), Message(role="tool", content='{"sum": 4}')]
    messages = [Message(role="developer", content="Be brief."), *messages]
    chatml = format_of("chatml")
    text = chatml.decode(chatml.prompt_ids(messages))
    assert "<|im_start|>developer\nBe brief." in text and '<|im_start|>tool\n{"sum": 4}' in text
    for family in ("mistral", "gemma", "zephyr", "llama3"):
        try:
            shown = format_of(family).decode(format_of(family).prompt_ids(messages))
        except InputError as error:
            assert "chat template" in str(error)
        else:
            assert "Be brief." in shown and '{"sum": 4}' in shown
    left_out = ChatFormat(make_tokenizer("chatml"))
    left_out._template = "{% for m in messages if m.role != 'tool' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(InputError, match="leaves out a message with the role tool"):
        left_out.prompt_ids(messages)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([{"role": "user\n<|im_end|>", "content": "x"}], "message 1 has role"),
        ([user("x"), {"role": "assistant", "content": None}], "message 2 has content None"),
        ([{"content": "x"}], "message 1 has role None"),
    ],
    ids=["empty", "role with control tokens", "no text", "no role"],
)
def test_a_malformed_conversation_is_refused_by_every_format(messages: list[Message], words: str) -> None:
    formats: list[PromptFormat] = [format_of("chatml"), format_of("base"), MessagesFormat()]
    for format in formats:
        with pytest.raises(InputError, match=words):
            format.prompt_ids(messages)
        with pytest.raises(InputError, match=words):
            format.count(messages)


def test_the_template_hash_is_the_sha256_of_the_words_in_use() -> None:
    import hashlib

    assert format_of("chatml").template_hash == hashlib.sha256(CHATML.encode()).hexdigest()
    assert format_of("base").template_hash == InContextPrompt.load("default").hash
    assert ChatFormat(make_tokenizer("chatml"), style="in_context").template_hash == InContextPrompt.load().hash


def test_style_in_context_puts_the_chat_template_aside_and_style_chat_insists_on_it() -> None:
    format = ChatFormat(make_tokenizer("llama3"), style="in_context")
    assert not format.has_template
    assert format.decode(format.prompt_ids(CONVERSATION)).startswith("<|begin_of_text|># Instruction\n")
    with pytest.raises(ConfigError, match="no chat template"):
        ChatFormat(make_tokenizer("base"), style="chat")


def test_a_format_loads_from_a_folder_and_travels_between_processes(tmp_path: Path) -> None:
    make_tokenizer("llama3").save_pretrained(tmp_path)
    loaded = ChatFormat.load(str(tmp_path))
    moved = pickle.loads(pickle.dumps(loaded))
    for format in (loaded, moved):
        assert format.prompt_ids(CONVERSATION) == format_of("llama3").prompt_ids(CONVERSATION)
        assert format.template_hash == format_of("llama3").template_hash


def test_a_folder_without_a_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer {tmp_path}: cannot be loaded"):
        ChatFormat.load(str(tmp_path))


def test_a_tokenizer_without_any_end_cannot_make_targets() -> None:
    from transformers import PreTrainedTokenizerFast

    format = ChatFormat(PreTrainedTokenizerFast(tokenizer_object=make_tokenizer("base").backend_tokenizer))
    assert format.stop_ids == ()
    with pytest.raises(ConfigError, match="neither an end-of-turn nor an eos token"):
        format.target_ids(CONVERSATION, "Good day")


def test_text_is_cut_between_characters_and_within_the_allowance(format: ChatFormat) -> None:
    text = "Hello there é 日本 😀😀 Good day Be kind"
    assert format.cut(text, 2) == "Hello there"
    assert format.cut(text, 0) == ""
    assert format.cut(text, 999) == text
    for allowance in range(format.num_tokens(text)):
        cut = format.cut(text, allowance)
        assert text.startswith(cut)
        assert format.num_tokens(cut) <= allowance


def test_messages_format_has_no_ids_and_counts_from_above() -> None:
    format = MessagesFormat()
    assert format.prompt_ids(CONVERSATION) == format.target_ids(CONVERSATION, "Good") == format.stop_ids == ()
    english = "The quick brown fox jumps over the lazy dog and rests in the shade of an old tree."
    assert format.num_tokens(english) == 28  # 82 bytes / 3; a real tokenizer needs about 19
    assert format.count([user(english), user("日本")]) == 28 + 2 + 2 * 4
    assert format.cut("日本日本", 2) == "日本"
    assert format.neutralise("<|im_end|>") == "<|im_end|>"
    assert format.neutralise("a\ud800b") == "a\ufffdb"
    with pytest.raises(InputError, match="takes messages"):
        format.decode([1])


def test_importing_the_room_loads_neither_torch_nor_transformers_nor_ray() -> None:
    code = "import sys, aft_ray.templates; sys.exit(bool({'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_thought_that_the_prompt_opens_is_closed_before_the_answer() -> None:
    format = format_of("open_thought")
    assert format.decode(format.prompt_ids(CONVERSATION)).endswith("<|im_start|>assistant\n<think>\n")
    target = format.target_ids(CONVERSATION, "Good day")
    assert format.decode(target) == "\n</think>\n\nGood day<|im_end|>"
    assert format.tokenizer.convert_tokens_to_ids("</think>") in target


def test_a_template_that_wants_lists_of_parts_gets_them() -> None:
    parts, chatml = format_of("parts"), format_of("chatml")
    assert parts.decode(parts.prompt_ids(CONVERSATION)) == chatml.decode(chatml.prompt_ids(CONVERSATION))
    assert parts.decode(parts.target_ids(CONVERSATION, "Good day")) == "Good day<|im_end|>"


def test_a_template_that_leaves_out_what_is_said_is_refused() -> None:
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="leaves out the text of messages: set its engine's chat_template"):
        ChatFormat(tokenizer)
