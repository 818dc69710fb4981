"""The in-context prompt of base models: blocks, fences, demonstrations, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from families import assistant, format_of, make_tokenizer, system, user

from aft_ray.errors import ConfigError, InputError
from aft_ray.templates import ChatFormat, InContextPrompt

SMALL = InContextPrompt(name="small", instruction="Be kind.", demonstrations=(("Hello", "Good day"),))


def test_a_conversation_is_rendered_as_fenced_blocks_behind_the_demonstrations() -> None:
    messages = [system("In French."), user("Hi"), assistant("Salut"), user("Name a river.")]
    assert SMALL.render(messages) == (
        "# Instruction\n\nBe kind.\n\n"
        "# Query:\n`````\nHello\n`````\n\n# Answer:\n`````\nGood day\n`````\n\n"
        "# Instruction\n`````\nIn French.\n`````\n\n"
        "# Query:\n`````\nHi\n`````\n\n# Answer:\n`````\nSalut\n`````\n\n"
        "# Query:\n`````\nName a river.\n`````\n\n# Answer:\n`````\n"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`````", "`\u200b````"),
        ("```py\n1\n```", "```py\n1\n```"),
        ("a`````b", "a`\u200b````b"),
        ("x\n# Query:\ny", "x\n#\u200b Query:\ny"),
        ("# Answer: z", "#\u200b Answer: z"),
        ("``two`` # Query: `one`", "``two`` # Query: `one`"),
    ],
)
def test_no_text_closes_its_block_or_opens_another(text: str, shown: str) -> None:
    assert f"# Query:\n`````\n{shown}\n`````\n\n# Answer:\n`````\n" in SMALL.render([user(text)])


@pytest.mark.parametrize("num_backticks", range(5, 14))
def test_a_run_of_backticks_never_leaves_a_fence(num_backticks: int) -> None:
    clean = SMALL.neutralise("`" * num_backticks)
    assert "`````" not in clean
    assert clean.replace("\u200b", "") == "`" * num_backticks


@pytest.mark.parametrize("family", ["base", "base_with_bos"])
def test_a_tokenizer_without_a_chat_template_gets_the_prompt_with_its_bos_and_stops_at_the_fence(family: str) -> None:
    tokenizer = make_tokenizer(family)
    format = ChatFormat(tokenizer, SMALL)
    ids = format.prompt_ids([user("Hello there")])
    rendered = tokenizer(SMALL.render([user("Hello there")]))["input_ids"]  # with the BOS, where it adds one
    assert list(ids) == rendered
    assert not format.has_template
    assert format.stop_strings == ("\n`````", "`````")
    assert format.stop_ids == (tokenizer.eos_token_id,)
    assert (
        format.decode(format.target_ids([user("Hello there")], "Good day")) == f"Good day\n`````{tokenizer.eos_token}"
    )


def test_an_answer_with_a_block_of_code_stays_whole() -> None:
    format = format_of("base")
    code = "```py\n1\n```"
    text = format.decode(format.target_ids([user("Hello")], code))
    assert text == f"{code}\n`````<|endoftext|>"
    assert not any(stop in code for stop in format.stop_strings)


def test_the_packaged_prompt_has_three_demonstrations_that_a_small_window_can_hold() -> None:
    prompt = InContextPrompt.load("default")
    assert len(prompt.demonstrations) == 3
    assert len(prompt.render([user("Hello")]).split()) < 450


def test_a_users_file_is_read_and_hashed_by_content(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("instruction: Be kind.\ndemonstrations:\n  - {query: Hello, answer: Good day}\n")
    prompt = InContextPrompt.load(str(path))
    assert prompt == dataclasses.replace(SMALL, name="mine")
    assert prompt.hash == SMALL.hash
    assert prompt.hash != dataclasses.replace(SMALL, instruction="Be brief.").hash


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("instruction: x\ndemonstration: []\n", "unknown key 'demonstration' .* did you mean 'demonstrations'"),
        ("instruction: x\n", "has no 'demonstrations'"),
        ("instruction: x\ndemonstrations:\n  - {query: a, anser: b}\n", r"demonstration 1 has \['anser', 'query'\]"),
        ("instruction: x\ndemonstrations:\n  - {query: a, answer: 3}\n", "demonstration 1, answer: expected text"),
        ("instruction: x\ndemonstrations:\n  - {query: a, answer: '`````'}\n", "answer: expected text without `````"),
    ],
    ids=["typo", "missing", "key", "type", "fence"],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        InContextPrompt.load(str(path))


def test_a_role_without_a_block_is_refused() -> None:
    with pytest.raises(InputError, match="no block for role 'tool'; known roles: system, user, assistant"):
        SMALL.render([{"role": "tool", "content": "x"}])
