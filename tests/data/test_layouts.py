"""The layouts of public data sets: every column that changes the question is used or refused, and none is dropped."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from aft_ray.config import PromptsConfig
from aft_ray.data.prompts import read_prompts
from aft_ray.data.prompts.stage import make_prompts
from aft_ray.errors import InputError
from aft_ray.records import PROMPTS, metadata_of, prompt_id_of
from tests.command_line import ROOT
from tests.data.test_prompts import read, write_jsonl
from tests.data.test_prompts_stage import lines_of, run_of


def said(*contents: str, first: str = "user") -> list[dict[str, str]]:
    """Return a conversation in which user and assistant alternate, after a `first` message of another role."""
    roles = itertools.chain([] if first == "user" else [first], itertools.cycle(("user", "assistant")))
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


SYSTEM = said("Answer in French.", "Name a river.", first="system")
ASKED = said("Name a river.")
LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "OpenOrca": ({"system_prompt": "Answer in French.", "question": "Name a river.", "response": "Le Nil."}, SYSTEM),
    "Alpaca with system": ({"instruction": "Name a river.", "input": "", "system": "Answer in French."}, SYSTEM),
    "Alpaca with history": (
        {"instruction": "And now?", "input": "It rains.", "history": [["Hi", "Hello"]], "output": "Wet."},
        said("Hi", "Hello", "And now?\n\nIt rains."),
    ),
    "history as JSON text": ({"prompt": "And now?", "history": '[["Hi", "Hello"]]'}, said("Hi", "Hello", "And now?")),
    "system beside messages": ({"system": "Answer in French.", "messages": ASKED}, SYSTEM),
    "the same system twice": ({"system": "Answer in French.", "messages": SYSTEM}, SYSTEM),
    "an empty system message": ({"messages": [{"role": "system", "content": ""}, *ASKED], "system": " "}, ASKED),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "Name a river."}]},
        ASKED,
    ),
    "messages as JSON text": ({"messages": json.dumps(SYSTEM)}, SYSTEM),
    "prompt as JSON text": ({"prompt": json.dumps(SYSTEM)}, SYSTEM),
    "a question about JSON": ({"prompt": '["a", "b"]: how long is it?'}, said('["a", "b"]: how long is it?')),
    "hh-rlhf": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Name a river.\n\nAssistant:"},
        said("Hi", "Hello", "Name a river."),
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Name"}, {"type": "text", "text": "two."}]}
            ]
        },
        said("Name\ntwo."),
    ),
    "a tool's result": (
        {"messages": [*said("2+2?", "I call a calculator."), {"role": "tool", "content": "4"}]},
        [*said("2+2?", "I call a calculator."), {"role": "tool", "content": "4"}],
    ),
    "Dolly": ({"instruction": "Who?", "context": "Ada wrote it."}, said("Who?\n\nAda wrote it.")),
    "MMLU": ({"question": "Where?", "choices": ["Rome", "Paris"], "answer": 1}, said("Where?\n\nA. Rome\nB. Paris")),
    "ARC": (
        {"question": "Where?", "choices": {"text": ["Rome", "Paris"], "label": ["1", "2"]}},
        said("Where?\n\n1. Rome\n2. Paris"),
    ),
    "AQuA": ({"question": "How many?", "options": ["A)2", "B)3"]}, said("How many?\n\nA)2\nB)3")),
    "options in the question": ({"question": "Rome or Paris?", "choices": ["Rome", "Paris"]}, said("Rome or Paris?")),
    "Self-Instruct": (
        {"instruction": "Shorten.", "instances": [{"input": "A long text.", "output": "A text."}]},
        said("Shorten.\n\nA long text."),
    ),
    "empty columns of other kinds": ({"prompt": "Hi", "tools": [], "images": None, "functions": "[]"}, said("Hi")),
}


@pytest.mark.parametrize(("row", "messages"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_becomes_the_conversation_that_was_meant(
    tmp_path: Path, row: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    [prompt] = read(tmp_path, row)
    assert prompt["messages"] == messages
    pa.Table.from_pylist([prompt], schema=PROMPTS)
    left = {"system", "system_prompt", "history", "input", "context", "choices", "options"} & set(metadata_of(prompt))
    assert not left, "what was used is no metadata"


REFUSED = {
    "tools": ({"prompt": "Hi", "tools": [{"name": "f"}]}, "'tools' changes the question, .*prompts.ignore_columns"),
    "an image": ({"prompt": "Hi", "image": "x.png"}, "column 'image' changes the question"),
    "a part that is an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "a part of type 'image_url'; only text is read",
    ),
    "a call of a tool": (
        {"messages": [*said("2+2?"), {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
        "message 2: 'tool_calls' cannot be a part",
    ),
    "a turn not to train on": (
        {"messages": [*said("2+2?"), {"role": "assistant", "content": "x", "weight": 0}]},
        "message 2: 'weight' 0 asks not to train on this turn",
    ),
    "an empty answer": ({"messages": said("2+2?", " ")}, "message 2: the text is empty; expected an answer"),
    "two system messages": ({"system": "Be brief.", "messages": SYSTEM}, "begin with another system message"),
    "two system columns": ({"system": "a", "system_prompt": "b", "prompt": "x"}, "system, system_prompt differ"),
    "a number as input": ({"instruction": "Hi", "input": 3}, "column 'input': expected text, found a number"),
    "a history of texts": ({"prompt": "Hi", "history": ["Hi"]}, r"turn 1: expected \[question, answer\], found text"),
    "options of numbers": ({"question": "Which?", "choices": [1, 2]}, "'choices': expected a list of texts"),
    "several instances": ({"instruction": "x", "instances": [{}, {}]}, "'instances': expected a list of one"),
    "an answer alone": ({"messages": [{"role": "assistant", "content": "Hi"}]}, "there is no turn before the answer"),
    "two answers": (
        {"messages": [*said("Hi", "Hello"), {"role": "assistant", "content": "Hello?"}]},
        "the last turn is 'assistant' before the answer, expected 'user'",
    ),
}


@pytest.mark.parametrize(("row", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_prompt_cannot_hold_is_refused_row_by_row(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=rf"prompts\.jsonl:1: .*{words}"):
        read(tmp_path, row)


@pytest.mark.parametrize("text", ["Rome.<|im_end|>", "Rome.\0"])
@pytest.mark.parametrize(
    "row", [{"messages": said("Capital?", "ANSWER")}, {"prompt": "Capital?", "reference": "ANSWER"}]
)
def test_unusual_text_is_rejected_in_answers_too(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    row = json.loads(json.dumps(row).replace('"ANSWER"', json.dumps(text)))
    assert len(read(tmp_path, row, unusual_text="keep")) == 1
    with pytest.raises(InputError, match=r"prompts\.jsonl:1: .*the text contains (NUL|the control token)"):
        read(tmp_path, row, unusual_text="reject")


def test_columns_that_are_no_part_of_the_question_can_be_named(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "system": "linux", "tools": ["hammer"], "input": 3}
    [prompt] = read(tmp_path, row, ignore_columns=["system", "tools", "input"])
    assert prompt["messages"] == said("Hi")
    assert metadata_of(prompt) == {"system": "linux", "tools": ["hammer"], "input": 3}


def test_a_conversation_that_ends_in_an_answer_is_a_prompt_with_a_reference(tmp_path: Path) -> None:
    [ultrachat] = read(tmp_path, {"prompt_id": "u1", "messages": said("Hi", "Hello", "Name a river.", "The Nile.")})
    assert ultrachat["messages"] == said("Hi", "Hello", "Name a river.")
    assert (ultrachat["prompt_id"], ultrachat["reference"]) == ("u1", "The Nile.")
    [sharegpt] = read(tmp_path, {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]})
    assert (sharegpt["messages"], sharegpt["reference"]) == (said("Hi"), "Yo")
    [named] = read(tmp_path, {"messages": said("Hi", "Hello"), "gold": "42"}, reference_column="gold")
    assert named["reference"] == "42"


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def response(text: str, model: str, score: float | None = None) -> dict[str, Any]:
    return {"text": text, "model": model, "score": score}


def test_preference_pairs_have_their_prompt_in_the_answers(tmp_path: Path) -> None:
    row = {"chosen": said("Hi", "Hello!"), "rejected": said("Hi", "What?"), "score_chosen": 8.5, "score_rejected": 2}
    [prompt] = read(tmp_path, row, responses="preference")
    assert prompt["messages"] == said("Hi")
    assert prompt["responses"] == [response("Hello!", "chosen", 8.5), response("What?", "rejected", 2.0)]
    assert prompt["metadata"] is None
    hh = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"}
    [transcript] = read(tmp_path, hh, responses="preference")
    assert (transcript["messages"], [r["text"] for r in transcript["responses"]]) == (said("Hi"), ["Hello!", "What?"])


def test_the_prompt_of_a_pair_is_the_longest_and_never_another_one(tmp_path: Path) -> None:
    system = said("Be brief.", "Hi", first="system")
    pair = {
        "chosen": [*system, {"role": "assistant", "content": "Yo"}],
        "rejected": [{"role": "assistant", "content": "No"}],
    }
    [longer] = read(tmp_path, {"prompt": "Hi", **pair}, responses="preference")
    assert longer["messages"] == system
    [with_column] = read(
        tmp_path,
        {"prompt": "Hi", "system": "Be brief.", "chosen": said("Hi", "a"), "rejected": "b"},
        responses="preference",
    )
    assert with_column["messages"] == system
    with pytest.raises(InputError, match="the answers follow another conversation than the one in column 'prompt'"):
        read(tmp_path, {"prompt": "Bye", **pair}, responses="preference")
    with pytest.raises(InputError, match="the conversations in chosen, rejected differ before their answers"):
        read(tmp_path, {"chosen": said("Hi", "a"), "rejected": said("Bye", "b")}, responses="preference")


def test_nectar_has_ranks_that_become_scores(tmp_path: Path) -> None:
    answers = [{"answer": "Nile.", "model": "gpt-4", "rank": 1.0}, {"answer": "Sea.", "model": "gpt-3", "rank": 7.0}]
    row = {"prompt": "\n\nHuman: Name a river.\n\nAssistant: ", "answers": answers, "turns": 1}
    [prompt] = read(tmp_path, row, responses="nectar")
    assert prompt["messages"] == ASKED
    assert prompt["responses"] == [response("Nile.", "gpt-4", -1.0), response("Sea.", "gpt-3", -7.0)]


def test_rows_of_one_prompt_are_grouped_with_the_scores_of_the_source(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Name a river.", "response": "Nile.", "helpfulness": 4, "verbosity": 2},
        {"prompt": "Name a bird.", "response": "Owl.", "helpfulness": 3, "verbosity": 1},
        {"prompt": "Name  a river.", "response": "Sea.", "helpfulness": 0, "verbosity": 1},
        {"prompt": "Name a river.", "response": "Nile.", "helpfulness": 4, "verbosity": 2},
    ]
    river, bird = read(tmp_path, *rows, responses="helpsteer", duplicates="group")
    assert river["responses"] == [response("Nile.", "response", 4.0), response("Sea.", "response", 0.0)]
    assert bird["responses"] == [response("Owl.", "response", 3.0)]
    assert metadata_of(river) == {"verbosity": 2}
    with pytest.raises(InputError, match=r"the same conversation .*group"):
        read(tmp_path, *rows, responses="helpsteer")


def test_lists_of_a_csv_file_are_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,answers,history\nHi,"[""a"", ""b""]","[[""x"", ""y""]]"\n')
    config = PromptsConfig.model_validate({"source": str(path), "responses": {"column": "answers"}})
    [prompt] = read_prompts(config)
    assert [r["text"] for r in prompt["responses"]] == ["a", "b"]
    assert prompt["messages"] == said("x", "y", "Hi")


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SAME = {
    "spaces": ("Name  a river. ", "Name a river."),
    "blank lines": ("Name\n\n\n a river.\r\n", "Name\n\n a river."),
    "line breaks in prose": ("Name a river\nand a lake:\n* one\n* two", "Name a river and a lake: * one * two"),
    "accents": ("cafe\u0301", "caf\u00e9"),
    "ends of lines of code": ("```\nx = 1   \n```", "```\nx = 1\n```"),
}
DIFFERENT = {
    "indentation": ("What prints\nif a:\n    b()\nc()", "What prints\nif a:\n    b()\n    c()"),
    "spaces in code": ("Run\n```\nprint('a  b')\n```", "Run\n```\nprint('a b')\n```"),
    "blank lines in code": ("```\na\n\n\nb\n```", "```\na\n\nb\n```"),
}


@pytest.mark.parametrize(("left", "right"), SAME.values(), ids=SAME)
def test_trivial_variations_are_one_prompt(left: str, right: str) -> None:
    assert prompt_id_of(said(left)) == prompt_id_of(said(right))


@pytest.mark.parametrize(("left", "right"), DIFFERENT.values(), ids=DIFFERENT)
def test_white_space_with_a_meaning_makes_two_prompts(left: str, right: str) -> None:
    assert prompt_id_of(said(left)) != prompt_id_of(said(right))


# ── all of them at once ──────────────────────────────────────────────────────────────────────────────────────────────

JUNK: list[Any] = [
    "{", "null", "3", '"text"', "[1, 2", "\x00", '{"prompt": ' + "9" * 5_000 + "}", "[" * 5_000,
    {}, {"text": "x"}, {"prompt": ""}, {"prompt": 3}, {"prompt": "x", "prompt_id": 7}, {"messages": [None]},
    {"prompt": "cut \ud83d"}, {"prompt": "a\0b"}, {"prompt": "stop <|im_end|>"}, {"prompt": "x", "task": "constraints"},
    {"prompt": "x", "task": "numeric", "reference": "none"},
]  # fmt: skip


@pytest.mark.parametrize("num_rows", [2_000, pytest.param(30_000, marks=pytest.mark.soak)])
def test_of_all_layouts_in_one_file_no_row_is_lost_and_each_is_accounted_for(tmp_path: Path, num_rows: int) -> None:
    """Rows of 50 layouts, good and bad, some of them repeated, in an order of their own."""
    draw = random.Random(0)
    kinds: list[Any] = [row for row, _ in (*LAYOUTS.values(), *REFUSED.values())] + JUNK
    kinds += [json.loads(row) for _, row, settings in documented() if "responses" not in settings]
    lines = []
    for number in range(num_rows):
        kind = draw.choice(kinds)
        if isinstance(kind, dict) and draw.random() < 0.9:
            text = json.dumps(kind).replace("Name a river.", f"Name river {number}.").replace("Hi", f"Hi {number}")
            kind = {**json.loads(text), "line": number + 1}
        lines.append(kind if isinstance(kind, str) else json.dumps(kind))
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run = run_of(
        tmp_path, str(tmp_path / "p.jsonl"), rate=1.0, on_bad_row="record", unusual_text="reject", duplicates="drop"
    )
    manifest = make_prompts(run)
    assert manifest.rows_in == num_rows == manifest.rows_out + manifest.num_failed + sum(manifest.filtered.values())
    places = [line["place"] for name in ("failed/rows.jsonl", "removed.jsonl") for line in lines_of(run, name)]
    others = {int(place.rpartition(":")[2]) for place in places}
    assert len(others) == len(places) == num_rows - manifest.rows_out
    kept = [json.loads(row["metadata"] or "{}").get("line") for row in run.folder.child("prompts").rows()]
    marked = {line for line in kept if line is not None}
    assert len(marked) == len(kept) - kept.count(None) and not marked & others
    assert kept.count(None) <= len(kinds), "a row without a mark is kept once"


# ── docs/data.md ─────────────────────────────────────────────────────────────────────────────────────────────────────


def documented() -> list[tuple[str, str, str]]:
    """Return the layouts of docs/data.md: name, row, settings."""
    table = (ROOT / "docs" / "data.md").read_text().partition("### Layouts")[2].partition("\n### ")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    return [(name, row.strip("`"), settings[0].strip("`") if settings else "") for name, row, *settings in lines]


@pytest.mark.parametrize(("row", "settings"), [one[1:] for one in documented()], ids=[one[0] for one in documented()])
def test_every_layout_of_the_documentation_is_read(tmp_path: Path, row: str, settings: str) -> None:
    [prompt] = read(tmp_path, json.loads(row), **(yaml.safe_load(settings) or {}))
    assert prompt["messages"][-1] == {"role": "user", "content": "Name a river."}
    has_system = "Be brief." in row
    assert (prompt["messages"][0] == {"role": "system", "content": "Be brief."}) == has_system
    if "responses" in settings:
        assert prompt["responses"][0]["text"] == "The Nile."
        assert len(prompt["responses"]) == row.count("The Nile.") + row.count("The sea.")
        scored = any(word in row for word in ("score", "rank", "helpfulness", "stars"))
        assert (prompt["responses"][0]["score"] is not None) == scored
    else:
        assert prompt["reference"] == ("The Nile." if "The Nile." in row else "Nile" if "Nile" in row else None)


def test_a_prompts_folder_with_answers_is_read_again(tmp_path: Path) -> None:
    rows = read(tmp_path, {"chosen": said("Hi", "Yo"), "rejected": said("Hi", "No")}, responses="preference")
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS), tmp_path / "again.parquet")
    config = PromptsConfig.model_validate(
        {"source": str(tmp_path / "again.parquet"), "responses": {"column": "responses", "score": "score"}}
    )
    assert list(read_prompts(config)) == rows


def test_a_large_group_keeps_the_order_of_its_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n % 50}", "answer": f"answer {n}", "by": f"model {n % 3}"} for n in range(400)]
    layout = {"columns": ["answer"], "models": ["by"]}
    source = write_jsonl(tmp_path / "p.jsonl", *rows)
    config = PromptsConfig.model_validate({"source": source, "responses": layout, "duplicates": "group"})
    prompts = list(read_prompts(config))
    assert len(prompts) == 50
    assert [r["text"] for r in prompts[7]["responses"]] == [f"answer {n}" for n in range(7, 400, 50)]
    assert prompts[7]["responses"][1] == response("answer 57", "model 0")
