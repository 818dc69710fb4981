"""The base classes of config models: frozen; an unknown key is refused, with the most similar known one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from aft_ray.engines.base import Sampling
from aft_ray.errors import nearest
from aft_ray.inference.plan import Plan


def _refuse_unknown(value: Any, known: Iterable[str]) -> Any:
    if isinstance(value, Mapping):
        names = sorted(known)
        for key in value:
            if key not in names:
                context = {"key": str(key), "hint": nearest(key, names)}
                raise PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", context)
    return value


def _known_fields(record: type) -> Callable[[Any], Any]:
    names = [field.name for field in dataclasses.fields(record)]
    return lambda value: _refuse_unknown(value, names)


SamplingField = Annotated[Sampling, BeforeValidator(_known_fields(Sampling))]
PlanField = Annotated[Plan, BeforeValidator(_known_fields(Plan))]


class Strict(BaseModel):
    """The base class of every config model. Instances are frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        return _refuse_unknown(value, cls.model_fields)


class EngineSettings(Strict):
    """The base class of every engine's settings."""

    OPERATIONAL: ClassVar[frozenset[str]] = frozenset()
    """Settings that change the speed, the retries or the price of answers, but not the answers. They may change on
    resume."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the answers: the engine's part of the fingerprint of a stage."""
        return self.model_dump(mode="json", exclude=set(self.OPERATIONAL))
