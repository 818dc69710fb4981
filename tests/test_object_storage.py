"""Folders on object storage: whole files, this node's copies, and one sentence for a place that cannot work."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from aft_ray.errors import ConfigError, StorageError
from aft_ray.storage import Folder, check_writable, content_hash, list_files, local_copy

NOBODY_THERE = "http://127.0.0.1:9"


def test_a_folder_on_object_storage_holds_what_a_local_one_does(any_bucket: str) -> None:
    folder = Folder.at(f"{any_bucket}/one").child("stage")
    assert folder.is_empty()
    folder.write_table("a.parquet", pa.table({"n": [1, 2]}))
    folder.append_line("log.jsonl", '{"n": 1}')
    folder.append_line("log.jsonl", '{"n": 2}')
    there = pickle.loads(pickle.dumps(folder))
    assert there.location == f"{any_bucket}/one/stage" and there.name == "stage"
    assert there.rows() == [{"n": 1}, {"n": 2}]
    assert there.json_lines("log.jsonl") == [{"n": 1}, {"n": 2}]
    assert list(list_files(Folder.at(f"{any_bucket}/one"))) == ["stage/a.parquet", "stage/log.jsonl"]
    assert not there.is_empty()


def test_folders_on_object_storage_are_listed_and_removed_as_local_ones_are(any_bucket: str, tmp_path: Path) -> None:
    for folder in (Folder.at(f"{any_bucket}/two"), Folder.at(tmp_path)):
        folder.write_bytes("list.json", b"{}")
        folder.child("best-1/sub").write_bytes("weights", b"1")
        folder.child("best-10").write_bytes("weights", b"1")
        assert folder.folder_names() == ["best-1", "best-10"]
        assert not folder.child("best-1").is_empty() and folder.child("best-1").exists()
        folder.remove_folder("best-1")
        assert list(list_files(folder)) == ["best-10/weights", "list.json"]
        assert folder.child("best-1").is_empty() and not folder.child("best-1").exists()


def test_a_copy_is_made_once_and_again_when_the_files_change(any_bucket: str, tmp_path: Path) -> None:
    folder = Folder.at(f"{any_bucket}/model")
    folder.write_bytes("config.json", b"{}")
    folder.child("sub").write_bytes("weights", b"1")
    with mock.patch.dict(os.environ, {"AFT_RAY_CACHE": str(tmp_path)}):
        copy = local_copy(folder.location)
        assert (copy / "sub" / "weights").read_bytes() == b"1"
        before = copy.stat().st_mtime_ns
        assert local_copy(folder.location) == copy and copy.stat().st_mtime_ns == before
        folder.child("sub").write_bytes("weights", b"22")
        assert (local_copy(folder.location) / "sub" / "weights").read_bytes() == b"22"
        folder.child("sub").write_bytes("weights", b"33")  # of the same size, and within the same second
        assert (local_copy(folder.location) / "sub" / "weights").read_bytes() == b"33"
        with pytest.raises(ConfigError, match=f"{any_bucket}/nothing: no such folder"):
            local_copy(f"{any_bucket}/nothing")
    assert local_copy(tmp_path) == tmp_path


def test_the_same_files_have_the_same_hash_wherever_they_lie(any_bucket: str, tmp_path: Path) -> None:
    for place in (f"{any_bucket}/hashed", str(tmp_path / "here")):
        Folder.at(place).write_bytes("adapter_model.safetensors", b"weights")
    assert content_hash(f"{any_bucket}/hashed") == content_hash(tmp_path / "here")
    before = content_hash(f"{any_bucket}/hashed")
    for place in (f"{any_bucket}/hashed", str(tmp_path / "here")):  # of the same size, and within the same second
        Folder.at(place).write_bytes("adapter_model.safetensors", b"Weights")
    assert content_hash(f"{any_bucket}/hashed") == content_hash(tmp_path / "here") != before


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_every_tensor_of_a_large_file_counts(tmp_path: Path, name: str) -> None:
    save = save_file if name.endswith("safetensors") else torch.save
    weights = {"small": torch.zeros(8), "first": torch.zeros(5 << 20), "second": torch.zeros(20 << 20)}
    hashes = []
    for changed in (None, "first", "second"):
        save({key: tensor + (key == changed) for key, tensor in weights.items()}, tmp_path / name)
        hashes.append(content_hash(tmp_path))
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("s3://no-such-bucket/run", "this place cannot hold a run: there is no such bucket"),
        ("ftp://host/run", "unknown scheme ftp://"),
        ("s3:/runs/run", "a URL has two slashes: s3://runs/run"),
        ("s3://", "no bucket"),
        ("/proc/run", "this place cannot hold a run"),
    ],
)
def test_a_place_that_cannot_work_is_refused_in_one_sentence(bucket: str, location: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_writable(location)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_bucket_that_google_does_not_have_is_named(google_bucket: str) -> None:
    with pytest.raises(ConfigError, match=r"gs://no-such-bucket/run: .* there is no such bucket"):
        check_writable("gs://no-such-bucket/run")


def test_a_place_that_works_keeps_nothing_of_the_check(any_bucket: str, tmp_path: Path) -> None:
    for place in (f"{any_bucket}/probed", str(tmp_path / "probed")):
        check_writable(place)
        assert Folder.at(place).is_empty()


def test_storage_that_does_not_answer_is_named(bucket: str) -> None:
    with mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": NOBODY_THERE}):
        folder = Folder.at(f"{bucket}/run")
        with pytest.raises(StorageError, match=f"{bucket}/run/a: cannot be written: the storage does not answer"):
            folder.write_bytes("a", b"1")
        with pytest.raises(ConfigError, match="cannot hold a run: the storage does not answer"):
            check_writable(f"{bucket}/run")


def test_a_full_or_forbidden_disk_is_one_sentence() -> None:
    with pytest.raises(StorageError, match="/proc/x/a: cannot be written: "):
        Folder.at("/proc/x").write_bytes("a", b"1")
    with pytest.raises(StorageError, match="/dev/full: cannot be written: No space left on device"):
        Folder.at("/dev").append_line("full", "1")
