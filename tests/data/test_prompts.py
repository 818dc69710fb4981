"""Rows of a source become prompts; a row that cannot be used is rejected with its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts import duplicates, read_prompts
from aft_ray.data.prompts.duplicates import SeenPrompts
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import PROMPTS, metadata_of, prompt_id_of

USER = {"role": "user", "content": "Name a river."}
STRICT: Any = {"on_bad_row": "stop", "unusual_text": "keep"}


def write_jsonl(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *rows: Any, **settings: Any) -> list[dict[str, Any]]:
    source = write_jsonl(tmp_path / "prompts.jsonl", *rows)
    return list(read_prompts(PromptsConfig(source=source, **(STRICT | settings))))


def test_the_packaged_prompts_are_rows_of_the_prompts_schema() -> None:
    rows = list(read_prompts(PromptsConfig()))
    table = pa.Table.from_pylist(rows, schema=PROMPTS)
    assert table.num_rows == 120
    assert set(rows[0]) == set(PROMPTS.names) - {"split"}  # the stage writes the split
    assert rows[0]["task"] == "constraints"
    assert rows[0]["prompt_id"] == prompt_id_of(rows[0]["messages"])
    assert metadata_of(rows[0])["constraints"][0]["type"]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"messages": [USER], "prompt": "not this"}, "Name a river."),
        ({"prompt": "Name a river."}, "Name a river."),
        ({"query": [USER]}, "Name a river."),
        ({"query": "Name a river."}, "Name a river."),
        ({"messages": None, "instruction": "Name a river."}, "Name a river."),
        ({"instruction": "Translate.", "input": "fleuve"}, "Translate.\n\nfleuve"),
        ({"instruction": "Translate.", "input": ""}, "Translate."),
        ({"question": "Name a river.", "answer": "Nile"}, "Name a river."),
    ],
)
def test_the_prompt_is_found_in_the_usual_columns(tmp_path: Path, row: dict[str, Any], content: str) -> None:
    [prompt] = read(tmp_path, row)
    assert prompt["messages"] == [{"role": "user", "content": content}]


def test_a_conversation_keeps_all_its_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Nile."}, USER]
    [prompt] = read(tmp_path, {"messages": turns})
    assert prompt["messages"] == turns


def test_named_columns_are_used_and_all_others_kept_as_metadata(tmp_path: Path) -> None:
    row = {"prompt_id": "r1", "ask": "How many?", "gold": 42, "level": 3, "tags": ["é"], "prompt": "other"}
    [prompt] = read(tmp_path, row, column="ask", reference_column="gold", task="numeric")
    assert prompt["prompt_id"] == "r1"
    assert prompt["reference"] == "42"
    assert prompt["task"] == "numeric"
    assert metadata_of(prompt) == {"level": 3, "tags": ["é"], "prompt": "other"}


def test_an_answer_column_becomes_the_reference_only_if_the_config_names_it(tmp_path: Path) -> None:
    row = {"question": "2+2?", "answer": "It is #### 4"}
    [unnamed] = read(tmp_path, row)
    assert (unnamed["reference"], metadata_of(unnamed)) == (None, {"answer": "It is #### 4"})
    [named] = read(tmp_path, row, reference_column="answer", task="numeric")
    assert (named["reference"], named["metadata"]) == ("It is #### 4", None)


def test_the_rows_of_a_prompts_folder_can_be_read_again(tmp_path: Path) -> None:
    rows = list(read_prompts(PromptsConfig(limit=5)))
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), tmp_path / "again.parquet")
    assert list(read_prompts(PromptsConfig(source=str(tmp_path / "again.parquet")))) == rows


def test_a_bad_row_beyond_the_limit_is_never_read(tmp_path: Path) -> None:
    assert len(read(tmp_path, {"prompt": "a"}, {"prompt": "b"}, "not json", limit=2)) == 2


def test_blank_lines_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}\n\n')
    assert len(list(read_prompts(PromptsConfig(source=str(path), **STRICT)))) == 2


def test_lone_surrogates_are_replaced_so_that_rows_can_be_written(tmp_path: Path) -> None:
    rows = read(tmp_path, r'{"prompt": "cut \ud83d", "note": "\ud83d"}')
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), tmp_path / "out.parquet")
    assert rows[0]["messages"][0]["content"] == "cut �"


BAD_LINES = [
    ('{"prompt": "a"', r"not valid JSON .* found '\{\"prompt\": \"a\"'"),
    ('["a"]', "expected an object with a prompt, found a list"),
    ('{"text": "a"}', "no prompt; expected one of messages, .* found columns: text.* prompts.column"),
    ("{}", "found columns: none"),
    ('{"prompt": null}', "found columns: none"),
    ('{"prompt": " "}', "column 'prompt': the text is empty"),
    ('{"prompt": 3}', "column 'prompt': expected text or a list of messages, found a number"),
    ('{"messages": []}', "column 'messages': the list is empty"),
    ('{"messages": ["a"]}', "column 'messages', message 1: expected {role, content} or {from, value}, found text"),
    ('{"messages": [{"from": "human", "text": "a"}]}', "found keys from, text"),
    ('{"messages": [{"role": "critic", "content": "a"}]}', "unknown role 'critic'; expected one of system, user"),
    ('{"messages": [{"role": "user", "content": [3]}]}', "content: expected text, found a list"),
    ('{"messages": [{"role": "system", "content": "a"}]}', "the last turn is 'system', expected 'user'"),
    ('{"prompt": "a", "prompt_id": 7}', "prompt_id: expected a non-empty text, found 7"),
    ('{"prompt": "a", "task": ["x"]}', "task: expected a name, found a list"),
    ('{"prompt": "a", "reference": {"b": 1}}', "reference column 'reference': expected text or a number, found an obj"),
    ('{"instruction": "a", "input": 3}', "column 'input': expected text, found a number"),
    ('{"prompt": "a", "task": "constraints"}', "task 'constraints' needs a column 'constraints'"),
    (
        '{"prompt": "a", "task": "constraints", "constraints": [{"type": "lowercase"}]}',
        "unknown type 'lowercase'; did you mean 'lower_case'",
    ),
    ('{"question": "a", "answer": "4", "task": "numeric"}', "needs a number in the reference.*prompts.reference_col"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES, ids=[line[:50] for line, _ in BAD_LINES])
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=rf"prompts\.jsonl:3: .*{message}"):
        read(tmp_path, {"prompt": "good"}, "", line)


def test_a_line_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "ok"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"prompts\.jsonl:2: not UTF-8"):
        list(read_prompts(PromptsConfig(source=str(path), **STRICT)))


def test_a_named_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"jsonl:1: no prompt; expected column 'ask' \(prompts.column\), found .*prompt"
    ):
        read(tmp_path, {"prompt": "a"}, column="ask")
    with pytest.raises(
        InputError, match=r"jsonl:1: no column 'gold' \(prompts.reference_column\); found columns: prom"
    ):
        read(tmp_path, {"prompt": "a"}, reference_column="gold")


def test_two_rows_with_one_id_are_refused_with_both_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "prompt_id": "x"}, {"prompt": "b"}, {"prompt": "c", "prompt_id": "x"}]
    with pytest.raises(InputError, match=r"jsonl:3: prompt_id 'x' is already used at .*jsonl:1; ids must be unique"):
        read(tmp_path, *rows)


def test_a_repeated_conversation_is_rejected_whatever_its_id_unless_it_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"jsonl:2: the same conversation as at .*jsonl:1, .*Remove one of them, .*duplicates: drop"
    ):
        read(tmp_path, {"prompt": "Hi  there"}, {"prompt": "Hi there"})
    own = [{"prompt": "Hi", "prompt_id": "1"}, {"prompt": "Hi", "prompt_id": "2"}]
    with pytest.raises(InputError, match=r"jsonl:2: the same conversation as at .*jsonl:1, whose prompt_id is 1\."):
        read(tmp_path, *own)
    assert len(read(tmp_path, *own, duplicates="keep")) == 2
    with pytest.raises(InputError, match="the same conversation"):
        read(tmp_path, {"prompt": "Hi"}, {"prompt": "Hi"}, duplicates="keep")


def test_repeated_conversations_can_be_dropped_but_one_id_for_two_never(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi  there", "n": 1}, {"prompt": "Bye"}, {"prompt": "Hi there", "n": 2}]
    first, second = read(tmp_path, *rows, duplicates="drop")
    assert (metadata_of(first), second["messages"][0]["content"]) == ({"n": 1}, "Bye")
    own_ids = [{"prompt": "a", "prompt_id": "x"}, {"prompt": "a", "prompt_id": "x"}, {"prompt": "a"}]
    assert [row["prompt_id"] for row in read(tmp_path, *own_ids, duplicates="drop")] == ["x"]
    same_id = [{"prompt": "a", "prompt_id": "x"}, {"prompt": "b", "prompt_id": "x"}]
    with pytest.raises(InputError, match=r"jsonl:2: prompt_id 'x' is already used at .*jsonl:1"):
        read(tmp_path, *same_id, duplicates="drop")
    taken = [{"prompt": "a"}, {"prompt": "b", "prompt_id": prompt_id_of([{"role": "user", "content": "a"}])}]
    with pytest.raises(InputError, match=r"is already used at .*jsonl:1"):
        read(tmp_path, *taken, duplicates="drop")


def test_every_conversation_is_remembered_with_its_first_place_and_id() -> None:
    seen = SeenPrompts()
    names = [f"p-{n}" for n in range(5_000)] + ["", "a\0b", "a\0c", "ü"]
    for number, name in enumerate(names):
        assert seen.conversation(name) is None
        assert seen.add(name, f"id of {name}", f"prompts.jsonl:{number}") is None
    for number, name in enumerate(names):
        first = (f"prompts.jsonl:{number}", f"id of {name}")
        assert seen.conversation(name) == seen.add("another", f"id of {name}", "elsewhere") == first
    assert seen.conversation("another") is None, "its id was taken"


def test_an_index_of_ids_that_cannot_grow_ends_the_run_instead_of_failing_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", *({"prompt": f"Number {n}"} for n in range(2_000)))
    monkeypatch.setattr(duplicates, "PRAGMAS", f"{duplicates.PRAGMAS}PRAGMA max_page_count = 20;")  # a full disk
    with pytest.raises(ConfigError, match=r"prompts\.source: the temporary index .*full.*SQLITE_TMPDIR"):
        list(read_prompts(PromptsConfig(source=source, on_bad_row="record")))


def test_a_bad_parquet_row_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b", ""]}), path)
    with pytest.raises(InputError, match=r"prompts\.parquet:row 3: .*the text is empty"):
        list(read_prompts(PromptsConfig(source=str(path), **STRICT)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("missing.parquet", "missing.parquet: no such file"),
        ("prompts.txt", "unknown file suffix; expected packaged:constraints, "),
        ("huub:x/y", "no such file: /.*/huub:x/y. Expected packaged:constraints, "),
        ("packaged:poems", "the package has no such prompts; expected constraints"),
        ("folder.jsonl", "folder.jsonl: no file of a known kind there"),
        ("broken.parquet", "broken.parquet: not a valid Parquet file"),
        ("empty.jsonl", "empty.jsonl: the source has no rows"),
        ("empty.parquet", "empty.parquet: the source has no rows"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    Path("prompts.txt").touch()
    Path("broken.parquet").write_bytes(b"PAR1 no")
    Path("empty.jsonl").write_text("\n\n")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), "empty.parquet")
    with pytest.raises(InputError, match=message):
        list(read_prompts(PromptsConfig(source=source)))


def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", {"question": "What is 2+2?", "answer": "4"})
    config = PromptsConfig(source=f"hub:{tmp_path}:train", reference_column="answer", task="numeric")
    (row,) = read_prompts(config)
    assert (row["messages"][0]["content"], row["reference"]) == ("What is 2+2?", "4")


def test_the_error_for_an_unreachable_hub_data_set_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"hub:nobody/nothing:test: cannot be loaded: .*or give a local file"):
        list(read_prompts(PromptsConfig(source="hub:nobody/nothing:test")))


def test_the_error_without_reasoning_gym_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"reasoning_gym is not installed; pip install aft-ray\[tasks\]"):
        list(read_prompts(PromptsConfig(source="reasoning_gym:chain_sum")))


def test_reasoning_gym_tasks_come_in_turn() -> None:
    pytest.importorskip("reasoning_gym")
    rows = list(read_prompts(PromptsConfig(source="reasoning_gym:chain_sum,leg_counting", limit=5), seed=3))
    recipes = [metadata_of(row)["reasoning_gym"] for row in rows]
    assert [recipe["name"] for recipe in recipes] == ["chain_sum", "leg_counting"] * 2 + ["chain_sum"]
    assert {row["task"] for row in rows} == {"reasoning_gym"}
    with pytest.raises(InputError, match="chain_sums"):
        list(read_prompts(PromptsConfig(source="reasoning_gym:chain_sums")))
