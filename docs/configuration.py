"""Make docs/configuration.md, the reference of all settings, from the models that check them (aft_ray/config/).

    python docs/configuration.py

Names, types, defaults and ranges are those of the models, and each sentence is the docstring under the field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, TypeAdapter

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from aft_ray.config import Config, EngineConfig, KeyConfig, PlacementConfig, TemplatesConfig  # noqa: E402
from aft_ray.config.serving import ReplicaConfig  # noqa: E402
from aft_ray.engines.base import Sampling  # noqa: E402
from aft_ray.inference.plan import Plan  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration reference

Every setting of a run's YAML (`configs/`), and of the `args:` of a Serve YAML (`serve_configs/`), which are those of
[`serving`](#serving) with an `engine`. Unknown keys are refused, with the nearest known one. `--set section.key=value`
changes one setting of the command line's run, and a file that begins with `base: other.yaml` holds only what differs
from that file. `aft_ray/config/conditions.py` has the rules between sections.

Where the default is a link, the defaults are those of the linked section. "None" is YAML's `null`.

This page is made by `docs/configuration.py`; the sentences are those of `aft_ray/config/`.
"""
SHARED: dict[Any, str] = {
    PlacementConfig: "placement",
    ReplicaConfig: "replicas",
    Sampling: "sampling",
    Plan: "plan",
    TemplatesConfig: "templates",
}
"""Models that several sections use, by the name under which each is described once."""
SAME = {"evaluation.prompts": "prompts"}
"""Settings whose model is described under another one."""
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "anything"}
ENGINES = get_args(get_args(EngineConfig)[0])
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of a table."""

    name: str
    annotation: Any
    metadata: tuple[Any, ...]
    default: Any
    """`...` where the setting must be given."""
    text: str


def settings_of(model: type) -> Iterator[Setting]:
    """Yield the settings of a pydantic model or of a dataclass, in their order."""
    if issubclass(model, BaseModel):
        for name, field in model.model_fields.items():
            default = ... if field.is_required() else field.get_default(call_default_factory=True)
            text = field.description or ""
            yield Setting(
                name=name, annotation=field.annotation, metadata=tuple(field.metadata), default=default, text=text
            )
        return
    hints, texts = get_type_hints(model, include_extras=True), docstrings(model)
    for one in dataclasses.fields(model):
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        yield Setting(
            name=one.name, annotation=hints[one.name], metadata=(), default=default, text=texts.get(one.name, "")
        )


def docstrings(model: type) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass, which Python itself does not keep."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    body = definition.body  # type: ignore[attr-defined]
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def is_engine(annotation: Any) -> bool:
    """Whether a type is `EngineConfig`, with or without its annotation."""
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    return set(get_args(bare)) == set(ENGINES)


def type_of(annotation: Any, path: str) -> str:
    """Return a type in words; a model is a link to its own section, whose path is that of the setting."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if is_engine(annotation):
        return "[engine](#engine)"
    if origin is Annotated:
        return type_of(inside[0], path)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(type_of(one, path) for one in inside)
    if origin is tuple and inside[-1] is not ...:
        return "list of " + " and ".join(type_of(one, path) for one in inside)
    if origin is tuple:
        return f"list of {type_of(inside[0], path)}"
    if origin in (dict, Mapping):
        return f"mapping of {type_of(inside[0], path)} to {type_of(inside[1], path)}"
    if annotation in NAMES:
        return NAMES[annotation]
    name = SHARED.get(annotation, SAME.get(path, path))
    return f"[{name}](#{anchor(name)})"


def models_in(annotation: Any) -> list[type]:
    """Return the models of a type that have a section of their own because nothing else uses them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if annotation in SHARED else [annotation]
    return [] if is_engine(annotation) else [model for one in get_args(annotation) for model in models_in(one)]


def bounds_of(setting: Setting) -> str:
    """Return the allowed range: bounds and patterns of the value, and those of the items of a list."""
    found = []
    for one in [*setting.metadata, *metadata_in(setting.annotation)]:
        for part in [one, *getattr(one, "metadata", ())]:
            found += [f"{sign} {getattr(part, name):g}" for name, sign in BOUNDS.items() if hasattr(part, name)]
            if getattr(part, "pattern", None) is not None:
                found.append(f"matches `{part.pattern}`")
    return ", ".join(found)


def metadata_in(annotation: Any) -> Iterator[Any]:
    """Yield what is annotated anywhere within a type."""
    if get_origin(annotation) is not Literal and not is_engine(annotation):
        yield from getattr(annotation, "__metadata__", ())
        for one in get_args(annotation):
            yield from metadata_in(one)


def default_of(setting: Setting) -> str:
    """Return the default as YAML; of a model, what differs from the model's own defaults."""
    value = setting.default
    if value is ...:
        return "required"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = changed(value)
    elif isinstance(value, tuple):
        value = [changed(one) if dataclasses.is_dataclass(one) else one for one in value]
    if value == {} and setting.default != {}:
        return ""
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    written = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
    return f"`{written.removesuffix('...' + chr(10)).strip()}`"


def changed(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from its defaults."""
    plain = type(value)()
    return {
        one.name: getattr(value, one.name)
        for one in dataclasses.fields(value)
        if getattr(value, one.name) != getattr(plain, one.name)
    }


def anchor(title: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^a-z0-9_ -]", "", title.lower()).replace(" ", "-")


def section(title: str, model: type, path: str) -> Iterator[str]:
    """Yield the table of a model, and the sections of the models in it."""
    below = []
    yield f"## {title}\n\n{flat(model.__doc__ or '')}\n"
    yield "| setting | type | default | allowed | meaning |\n|---|---|---|---|---|"
    for setting in settings_of(model):
        own = f"{path}.{setting.name}" if path else setting.name
        kind = type_of(setting.annotation, own)
        cells = (f"`{setting.name}`", kind, default_of(setting), bounds_of(setting), flat(setting.text))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        below += [(own, one) for one in models_in(setting.annotation) if own not in SAME]
    yield ""
    for own, one in below:
        yield from section(own, one, own)


def flat(text: str) -> str:
    return " ".join(text.split())


def page() -> str:
    """Return the whole page."""
    lines = [INTRODUCTION, *section("A run", Config, "")]
    lines.append("## engine\n\nThe model that answers, chosen by `type`.\n")
    for engine in ENGINES:
        kind = engine.model_fields["type"].default
        lines += section(f"engine: {kind}", engine, f"engine: {kind}")
    for model, name in SHARED.items():
        lines += section(name, model, name)
    lines += section("keys_file", KeyConfig, "keys_file")
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def main() -> None:
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)}: {len(page().splitlines())} lines")


if __name__ == "__main__":
    main()
