"""Chat templates for base models: the packaged families, files, and when which prompt is used."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import CONVERSATION, format_of, make_tokenizer, system, user

from aft_ray.config import ScriptedEngineConfig, TransformersEngineConfig
from aft_ray.config.loading import validate
from aft_ray.data.training_set import format_to_train
from aft_ray.engines.base import EngineInfo
from aft_ray.errors import ConfigError
from aft_ray.models import has_chat_template
from aft_ray.templates.families import template_text
from aft_ray.templates.loading import load_format

CODE = "Like this:\n\n```py\nprint(1)\n```\n\nand no other way."


def base_of(family: str, folder: Path) -> EngineInfo:
    """Write the tokenizer of a base model: the vocabulary of a family, without its chat template."""
    make_tokenizer(family).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return EngineInfo(model="base", tokenizer=str(folder), max_model_len=512)


def with_template(info: EngineInfo, template: str) -> EngineInfo:
    return EngineInfo(model="base", tokenizer=info.tokenizer, max_model_len=512, chat_template=template)


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_a_packaged_family_gives_a_base_model_the_ids_of_its_instruct_model(family: str, tmp_path: Path) -> None:
    prompts = load_format(with_template(base_of(family, tmp_path), family))
    known = format_of(family)
    for messages in (CONVERSATION, [system("Be kind"), user("Hello")]):
        assert prompts.prompt_ids(messages) == known.prompt_ids(messages)
        assert prompts.target_ids(messages, "Good day") == known.target_ids(messages, "Good day")
    assert prompts.stop_ids == known.stop_ids


def test_a_family_whose_marks_are_no_tokens_ends_answers_with_the_eos(tmp_path: Path) -> None:
    prompts = load_format(with_template(base_of("base", tmp_path), "chatml"))
    eos = make_tokenizer("base").eos_token_id
    assert prompts.stop_ids == (eos,)
    assert prompts.decode(prompts.target_ids(CONVERSATION, "Good day")) == "Good day<|endoftext|>"


def test_a_model_that_was_not_taught_its_template_samples_in_context(tmp_path: Path) -> None:
    info = with_template(base_of("llama3", tmp_path), "llama3")
    assert load_format(info).has_template
    assert not load_format(info, "auto").has_template


def test_a_template_replaces_that_of_an_instruct_model_in_every_style(tmp_path: Path) -> None:
    make_tokenizer("chatml").save_pretrained(tmp_path)
    mine = "{% for m in messages %}{{ m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    info = with_template(EngineInfo(model="m", tokenizer=str(tmp_path), max_model_len=512), mine)
    for style in ("auto", "chat"):
        prompts = load_format(info, style)  # type: ignore[arg-type]
        assert prompts.decode(prompts.prompt_ids([user("Hello")])) == "user>Hello<|im_end|>"


def test_nothing_is_trained_or_served_without_a_template(tmp_path: Path) -> None:
    info = base_of("base", tmp_path)
    with pytest.raises(ConfigError, match=r"no chat template: set its engine's chat_template \(chatml, llama3"):
        load_format(info)
    with pytest.raises(ConfigError, match="no chat template"):
        format_to_train(ScriptedEngineConfig(tokenizer=info.tokenizer))


def test_what_is_trained_keeps_blocks_of_code_as_they_are(tmp_path: Path) -> None:
    info = base_of("llama3", tmp_path)
    prompts = format_to_train(ScriptedEngineConfig(tokenizer=info.tokenizer, chat_template="llama3"))
    assert prompts.decode(prompts.target_ids(CONVERSATION, CODE)) == f"{CODE}<|eot_id|>"


def test_a_file_is_kept_as_its_text_so_that_it_travels_with_the_config(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(template_text("chatml"))
    raw = {"type": "transformers", "model": "m/m", "chat_template": str(tmp_path / "mine.jinja")}
    config = validate(TransformersEngineConfig, raw, origin="run.yaml")
    (tmp_path / "mine.jinja").unlink()
    assert template_text(config.chat_template) == template_text("chatml")
    assert TransformersEngineConfig.model_validate(config.model_dump()) == config


def test_an_unknown_family_is_refused_with_the_nearest(tmp_path: Path) -> None:
    raw = {"type": "transformers", "model": "m/m", "chat_template": "chatlm"}
    with pytest.raises(ConfigError, match=r"chat_template.*chatlm: no such file.*did you mean 'chatml'"):
        validate(TransformersEngineConfig, raw, origin="run.yaml")


def test_a_template_is_part_of_the_identity_only_where_there_is_one() -> None:
    plain = TransformersEngineConfig(model="m/m")
    named = TransformersEngineConfig(model="m/m", chat_template="chatml")
    text = TransformersEngineConfig(model="m/m", chat_template=template_text("chatml"))
    assert "chat_template" not in plain.identity()
    assert named.identity() == text.identity() != plain.identity()


def test_it_is_known_before_the_start_whether_a_model_folder_has_a_template(tmp_path: Path) -> None:
    make_tokenizer("chatml").save_pretrained(tmp_path / "chat")
    base_of("base", tmp_path / "base")
    assert [has_chat_template(str(tmp_path / name)) for name in ("chat", "base", "empty")] == [True, False, None]
