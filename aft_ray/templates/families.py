"""Chat templates for models that come without one: a family by name, or a file of one's own.

    template_text("chatml")                 the packaged template
    template_text("{% for message ...")     itself: a config keeps the text of a file, which then travels with it

A family fits a model whose vocabulary has its control tokens: `chatml` that of Qwen base models, `llama3` that of
Llama-3 base models. Where they are not tokens, they are ordinary text, and answers end with the tokenizer's eos.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from aft_ray.errors import ConfigError, nearest

FAMILIES = ("chatml", "llama3")
_GIVEN = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "raise_exception",
    "strftime_now", "namespace", "range", "dict",
)  # fmt: skip
"""Variables of templates that transformers fills, and globals of Jinja."""
_GENERATION_TAGS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Marks of the trained part of a text, which only transformers knows."""
_FOLDER = Path(__file__).parent / "families"


def read_template(reference: str) -> str:
    """Return a family's name or a template's text as they are, and the content of a file in its place."""
    if reference in FAMILIES or "{" in reference:
        return reference
    path = Path(reference).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"chat_template {reference}: no such file, and not a family of templates; "
            f"{nearest(reference, FAMILIES, 'families')}"
        )
    return path.read_text(encoding="utf-8")


def template_text(template: str) -> str:
    """Return the Jinja text of a template that `read_template` returned."""
    return (_FOLDER / f"{template}.jinja").read_text(encoding="utf-8") if template in FAMILIES else template


def arguments_of(template: str, tokenizer: Any) -> frozenset[str]:
    """Return the names of what a template can be told besides messages and tools, such as `enable_thinking`."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        used = meta.find_undeclared_variables(environment.parse(_GENERATION_TAGS.sub("", template)))
    except TemplateSyntaxError:
        return frozenset()
    return frozenset(used - set(_GIVEN) - set(tokenizer.special_tokens_map))


def template_hash(template: str) -> str:
    """Return the sha256 of a template's text."""
    return hashlib.sha256(template_text(template).encode()).hexdigest()
