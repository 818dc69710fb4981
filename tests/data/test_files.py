"""Prompts are read from every kind of file, compressed or not, from folders and globs, and no further than needed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts import read_prompts
from aft_ray.data.prompts.files import content_of, read_files
from aft_ray.data.prompts.sources import source_content
from aft_ray.errors import InputError
from aft_ray.storage import Folder

ROWS = [{"prompt": f'Question {n}\nwith ünïcode, "quotes" and 中文', "n": n} for n in range(30)]


def written(kind: str) -> bytes:
    """Return ROWS as a file of a kind."""
    match kind:
        case "jsonl":
            return "\n\n".join(json.dumps(row) for row in ROWS).encode()
        case "array":
            return json.dumps(ROWS, indent=2, ensure_ascii=False).encode("utf-8-sig")
        case "object":
            return json.dumps({"canary": "x", "examples": ROWS}).encode()
        case "csv" | "tsv":
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, ["prompt", "n"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
            return text.getvalue().encode("utf-8-sig")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def packed(content: bytes, suffix: str) -> bytes:
    match suffix:
        case ".gz":
            return gzip.compress(content)
        case ".bz2":
            return bz2.compress(content)
        case ".zst":
            return pa.compress(content, "zstd", asbytes=True)  # type: ignore[no-any-return]
    return content


FILES = [
    *(
        (f"p.{suffix}{pack}", kind)
        for suffix, kind in (("jsonl", "jsonl"), ("json", "array"), ("csv", "csv"), ("tsv", "tsv"))
        for pack in ("", ".gz", ".zst", ".bz2")
    ),
    ("p.json", "object"),
    ("p.json", "jsonl"),
    ("p.ndjson", "jsonl"),
    ("p.parquet", "parquet"),
]


@pytest.mark.parametrize(("name", "kind"), FILES, ids=[f"{name}-{kind}" for name, kind in FILES])
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str, kind: str) -> None:
    suffix = Path(name).suffix if Path(name).suffix in {".gz", ".zst", ".bz2"} else ""
    (tmp_path / name).write_bytes(packed(written(kind), suffix))
    prompts = list(read_prompts(PromptsConfig(source=str(tmp_path / name))))
    assert [prompt["messages"][0]["content"] for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert [json.loads(prompt["metadata"])["n"] in (n, str(n)) for n, prompt in enumerate(prompts)] == [True] * 30


def test_a_folder_and_a_glob_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in (
        "b/two.jsonl",
        "a/one.jsonl.gz",
        "a/.hidden.jsonl",
        "_logs/x.jsonl",
        "a/README.md",
        "c.jsonl.1-a.partial",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        line = json.dumps({"prompt": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith("gz") else line)

    def places(source: str) -> list[tuple[str, str]]:
        return [(place, row["prompt"]) for place, row in read_files(source, "prompts.source")]

    folder = str(tmp_path)
    both = [(f"{folder}/a/one.jsonl.gz:1", "a/one.jsonl.gz"), (f"{folder}/b/two.jsonl:1", "b/two.jsonl")]
    assert places(folder) == places(f"{folder}/") == both
    assert places(f"{folder}/**/*.jsonl*") == both
    assert places(f"{folder}/[ab]/[ot][nw]*.jsonl") == [both[1]]
    assert places(f"{folder}/?/one.*") == [both[0]]
    with pytest.raises(InputError, match=r"no file matches .*/\*\.jsonl"):
        places(f"{folder}/*.jsonl")
    (tmp_path / "c.csv").write_text("prompt\nx\n")
    with pytest.raises(InputError, match=r"files of several kinds \(csv, lines\); name one of them"):
        places(folder)


def test_files_on_object_storage_are_read_like_local_ones(bucket: str, tmp_path: Path) -> None:
    for name in ("one.jsonl.zst", "two.jsonl.zst"):
        folder = Folder.at(f"{bucket}/files")
        with folder.fs.open_output_stream(folder.file(name), compression=None) as file:
            file.write(packed(json.dumps({"prompt": name}).encode(), ".zst"))
    for source in (f"{bucket}/files", f"{bucket}/files/*.zst"):
        assert [row["prompt"] for _, row in read_files(source, "x")] == ["one.jsonl.zst", "two.jsonl.zst"]
    [(place, _)] = read_files(f"{bucket}/files/t*.zst", "x")
    assert place == f"{bucket}/files/two.jsonl.zst:1"
    assert content_of(f"{bucket}/files") is not None


def test_a_limit_reads_no_more_than_its_rows_need(tmp_path: Path) -> None:
    broken = {
        "p.jsonl": "\n".join([*(json.dumps(row) for row in ROWS), "no json"]),
        "p.json": json.dumps(ROWS)[:-1] + ", nonsense " + "x" * 1_000_000,
        "p.csv": 'prompt\na\nb\nc\n"never closed',
    }
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
        assert len(list(read_prompts(PromptsConfig(source=str(tmp_path / name), limit=3)))) == 3, name
    (tmp_path / "two").mkdir()
    (tmp_path / "two/a.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "two/b.jsonl.gz").write_bytes(b"not compressed")
    assert len(list(read_prompts(PromptsConfig(source=str(tmp_path / "two"), limit=1)))) == 1


def test_a_data_set_of_the_hub_is_streamed_if_a_limit_is_set(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"Number {n}"}) + "\n" for n in range(20)))
    config = PromptsConfig(source=f"hub:{tmp_path}:train#main", limit=3)
    assert [row["messages"][0]["content"] for row in read_prompts(config)] == ["Number 0", "Number 1", "Number 2"]


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "json": ("p.json", b'[{"prompt": "a"}, {"prompt": ', r"p\.json: not valid JSON after row 1: "),
    "json text": ("p.json", b"[1, 2", r"p\.json: not valid JSON after row 1: it ends within the array"),
    "gzip": ("p.jsonl.gz", b"not compressed", r"p\.jsonl\.gz: cannot be read: "),
    "half a gzip": ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 5_000)[:100], "cannot be read: "),
    "zstd": ("p.jsonl.zst", b"not compressed", "cannot be read: "),
    "encoding": ("p.json", '[{"prompt": "é"}]'.encode("latin-1"), "not UTF-8 text"),
    "csv encoding": ("p.csv", "prompt\né\n".encode("latin-1"), "not UTF-8 text"),
}


@pytest.mark.parametrize(("name", "content", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_ends_the_run_with_its_name(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        list(read_prompts(PromptsConfig(source=str(tmp_path / name), duplicates="drop")))


def test_bad_rows_of_a_csv_file_fail_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,reference\na,1\nb,2,3\n"c" d,4\n"e\nf",\n')
    config = PromptsConfig(source=str(path), on_bad_row="record")
    rows = list(read_prompts(config))
    assert [(row["messages"][0]["content"], row["reference"]) for row in rows] == [("a", "1"), ("e\nf", None)]
    found = [row for _, row in read_files(str(path), "x") if isinstance(row, InputError)]
    assert [str(error).partition("p.csv")[2][:30] for error in found] == [
        ":3: 1 cells more than the firs",
        ":4: not valid CSV: ',' expected"[:30],
    ]


def test_a_single_object_is_one_row_unless_it_holds_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    rows: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
    for value, num in ((rows, 1), ({"data": [rows, rows]}, 2), ({"prompt": "Hi"}, 1)):
        path.write_text(json.dumps(value, indent=1))
        assert len(list(read_files(str(path), "x"))) == num


def test_content_counts_however_a_source_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data" / "p.jsonl"
    path.parent.mkdir()
    path.write_text('{"prompt": "a"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = [str(path), "data/p.jsonl", "~/data/p.jsonl", f"file://{path}", "data", "data/*.jsonl"]
    before = {source_content(source, None) for source in spellings}
    assert len(before) == 1 and None not in before
    (tmp_path / "elsewhere.jsonl").write_text('{"prompt": "a"}')
    assert source_content("elsewhere.jsonl", None) in before
    assert source_content(str(path), 1) not in before, "a limit counts"
    path.write_text('{"prompt": "b"}')
    after = {source_content(source, None) for source in spellings}
    assert len(after) == 1 and not after & before
    assert source_content("nowhere.jsonl", None) is None
