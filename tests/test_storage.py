"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from aft_ray.errors import StorageError
from aft_ray.storage import PARTIAL, Folder, whole_folder, write_text


def test_a_table_and_its_footer_come_back(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "stage")
    table = pa.table({"a": [1, 2]}).replace_schema_metadata({b"key": b"value"})
    folder.write_table("one.parquet", table)
    assert folder.read_table("one.parquet").to_pylist() == [{"a": 1}, {"a": 2}]
    assert folder.read_metadata("one.parquet")[b"key"] == b"value"
    assert folder.rows() == [{"a": 1}, {"a": 2}]


def test_what_a_kill_left_half_written_is_never_listed(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.write_bytes("whole.parquet", b"x")
    (tmp_path / f"half.parquet.123{PARTIAL}").write_bytes(b"y")
    assert folder.names() == ["whole.parquet"]


def test_a_write_that_fails_leaves_nothing_and_what_a_kill_left_can_be_removed(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(StorageError, match="taken: cannot be written"):
        folder.write_bytes("taken", b"x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]
    (tmp_path / "taken" / f"half.parquet.1-a{PARTIAL}").touch()
    (tmp_path / f"adapter{PARTIAL}" / "below").mkdir(parents=True)
    assert folder.folder_names() == ["taken"]
    assert not folder.child("taken").is_empty(), "half a file is something"
    folder.remove_partial()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


def test_a_folder_uri_is_the_same_folder(tmp_path: Path) -> None:
    Folder.at(f"file://{tmp_path}").child("sub").write_bytes("a.txt", b"hello")
    assert Folder.at(tmp_path).child("sub").read_bytes("a.txt") == b"hello"


def test_a_missing_folder_lists_nothing(tmp_path: Path) -> None:
    assert Folder.at(tmp_path / "nowhere").names() == []
    assert not Folder.at(tmp_path / "nowhere").exists()


def test_lines_are_appended(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    folder.append_line("log.jsonl", "one")
    folder.append_line("log.jsonl", "two")
    assert folder.read_bytes("log.jsonl") == b"one\ntwo\n"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(RuntimeError), whole_folder(output) as partial:
        (partial / "half.txt").write_text("half")
        raise RuntimeError
    assert not output.exists()
    with whole_folder(output) as partial:
        (partial / "whole.txt").write_text("whole")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["whole.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_a_text_file_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("old", "new\n"):
        write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text() == "new\n"
    assert len(list(tmp_path.iterdir())) == 1
