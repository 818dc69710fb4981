"""docs/templates.md is true: its files load, its text equals the packaged one, and its code runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from aft_ray.templates import AggregatorTemplate, InContextPrompt

PAGE = (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_shows_the_packaged_template_and_files_that_load(tmp_path: Path) -> None:
    packaged, published, in_context = blocks("yaml")
    path = tmp_path / "file.yaml"
    assert AggregatorTemplate(**yaml.safe_load(packaged)) == AggregatorTemplate.load("aft")
    path.write_text(published, encoding="utf-8")
    assert not AggregatorTemplate.load(str(path)).escape
    path.write_text(in_context, encoding="utf-8")
    assert len(InContextPrompt.load(str(path)).demonstrations) == 1


def test_the_pages_code_prints_the_slots() -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[Draft 2]\nIt is Lyon.\n[End of draft 2]\n")
