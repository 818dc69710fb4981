"""Runs a test once for each chat-template family."""

from __future__ import annotations

import pytest
from families import CHAT_FAMILIES, format_of

from aft_ray.templates import ChatFormat


@pytest.fixture(params=CHAT_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def format(family: str) -> ChatFormat:
    return format_of(family)
