"""The tools of a chat request: what they are, and which of them the answer may or must call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from aft_ray.engines.base import ToolUse

MOST_TOOLS = 128
"""As many as the OpenAI API takes."""


class Function(BaseModel):
    """A function that the model may call, with a JSON schema of its arguments."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str = Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """One tool; all of them are functions."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str


class NamedTool(BaseModel):
    """The choice of one tool, which the answer must call."""

    model_config = ConfigDict(strict=True, extra="ignore")

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(max_length=MOST_TOOLS)]


def _known_choice(value: Any) -> Any:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise PydanticCustomError("invalid_value", "expected none, auto, required or one of the tools")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_known_choice)]


def tool_use_of(tools: list[Tool] | None, choice: ToolChoice | None, *, is_parallel: bool) -> ToolUse | None:
    """Return the tools of a request, or None where it has none. Raises where the choice is not among them."""
    names = [tool.function.name for tool in tools or ()]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        text = "tool_choice: '{name}' is not among the tools"
        context = {"name": choice.function.name[:100], "param": "tool_choice"}
        raise PydanticCustomError("invalid_value", text, context)
    if not tools:
        if choice == "required":
            raise PydanticCustomError("invalid_value", "tool_choice: required needs tools", {"param": "tool_choice"})
        return None
    return ToolUse(
        tools=tuple(tool.model_dump(exclude_none=True) for tool in tools),
        choice=choice.model_dump() if isinstance(choice, NamedTool) else choice or "auto",
        is_parallel=is_parallel,
    )
