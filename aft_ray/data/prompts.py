"""Prompts: any source -> rows with the columns of `records.PROMPTS`.

    packaged:constraints              open instructions with machine-checkable constraints, in the package
    FILE.jsonl, FILE.parquet          one row per prompt; a local path, or s3://..., gs://...
    hub:DATASET[@CONFIG][:SPLIT]      a data set of the Hugging Face hub; split `train` unless named
    reasoning_gym:TASK[,TASK...]      procedural tasks with their own verifiers, turn by turn

The prompt stands in the first of `messages`, `prompt`, `query`, `instruction`, `question` (or in the column that the
config names), as text or as a list of {role, content}; a text `input` beside `instruction` is appended to it. A row may
bring `prompt_id`, `task` and `reference`. Every other column is kept in `metadata`.

A row that cannot be used is refused at once, with file and line. Nothing is skipped in silence but blank lines.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from aft_ray.config import PromptsConfig
from aft_ray.data.answers import final_number
from aft_ray.data.constraints import parse_all
from aft_ray.errors import ConfigError, InputError
from aft_ray.records import Message, prompt_id_of
from aft_ray.templates.control import without_surrogates

PROMPT_COLUMNS = ("messages", "prompt", "query", "instruction", "question")
ROLES = ("system", "user", "assistant")
SOURCES = "packaged:constraints, FILE.jsonl, FILE.parquet, hub:DATASET[@CONFIG][:SPLIT] or reasoning_gym:TASK[,TASK...]"
NUM_REASONING_GYM = 500
"""Rows drawn from `reasoning_gym` when the config sets no limit."""

Placed = tuple[str, Any]
"""Where a raw row stands (`prompts.jsonl:3`), and the row as the source gives it."""


def read_prompts(config: PromptsConfig, seed: int = 0) -> Iterator[dict[str, Any]]:
    """The prompts of `config.source`, at most `config.limit`, in the source's order.

    Raises InputError that names the place, what was found and what to do, ConfigError where a package is missing.
    `seed` draws the items of procedural sources.
    """
    places: dict[str, tuple[str, bool]] = {}
    num_rows = 0
    for place, raw in itertools.islice(_open_source(config, seed), config.limit):
        row, has_own_id = to_prompt(raw, config, place)
        _refuse_duplicate(row["prompt_id"], place, has_own_id, places)
        num_rows += 1
        yield row
    if num_rows == 0:
        raise InputError(f"prompts.source {config.source}: no rows in it; expected one prompt or more")


def to_prompt(raw: Any, config: PromptsConfig, place: str) -> tuple[dict[str, Any], bool]:
    """One raw row as a PROMPTS row, and whether its `prompt_id` is the source's own."""
    if not isinstance(raw, Mapping):
        raise InputError(f"{place}: expected an object with a prompt, found {_kind(raw)}")
    row = {key: value for key, value in raw.items() if value is not None}
    column = _prompt_column(row, config.column, place)
    messages = _messages(row, column, place)
    used = {column, "prompt_id", "task", "metadata"} | ({"input"} if column == "instruction" else set())
    reference_column = config.reference_column or "reference"
    prompt = {
        "prompt_id": _prompt_id(row, messages, place),
        "messages": messages,
        "reference": _reference(raw, reference_column, config.reference_column is not None, place),
        "task": config.task or _task(row, place),
        "metadata": _metadata(row, used | {reference_column}),
    }
    _check_task(prompt, row, place)
    return prompt, "prompt_id" in row


def split_held_out(
    rows: Iterable[dict[str, Any]], num_held_out: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training rows and held-out rows: the `num_held_out` lowest seeded hashes of prompt_id are held out.

    Which prompts are held out does not depend on the order of the rows; both lists keep it.
    """
    rows = list(rows)
    if rows and num_held_out >= len(rows):
        raise ConfigError(
            f"prompts.held_out {num_held_out}: leaves none of the {len(rows)} prompts for training. "
            f"Set prompts.held_out below {len(rows)} or give more prompts"
        )
    held_out = set(sorted((row["prompt_id"] for row in rows), key=lambda name: _draw(seed, name))[:num_held_out])
    train = [row for row in rows if row["prompt_id"] not in held_out]
    return train, [row for row in rows if row["prompt_id"] in held_out]


def _draw(seed: int, prompt_id: str) -> bytes:
    return hashlib.blake2b(f"held_out/{seed}/{prompt_id}".encode(), digest_size=16).digest()


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _prompt_column(row: Mapping[str, Any], wanted: str | None, place: str) -> str:
    columns = (wanted,) if wanted else PROMPT_COLUMNS
    for column in columns:
        if column in row:
            return column
    expected = f"column '{wanted}' (prompts.column)" if wanted else f"one of {', '.join(PROMPT_COLUMNS)}"
    raise InputError(
        f"{place}: no prompt; expected {expected}, found columns: {', '.join(map(str, row)) or 'none'}. "
        "Name the right one in prompts.column"
    )


def _messages(row: Mapping[str, Any], column: str, place: str) -> list[Message]:
    value = row[column]
    if isinstance(value, str):
        extra = row.get("input", "") if column == "instruction" else ""
        if not isinstance(extra, str):
            raise InputError(f"{place}: column 'input': expected text beside 'instruction', found {_kind(extra)}")
        value = [{"role": "user", "content": f"{value}\n\n{extra}" if extra.strip() and value.strip() else value}]
    if not isinstance(value, list):
        raise InputError(f"{place}: column '{column}': expected text or a list of messages, found {_kind(value)}")
    if not value:
        raise InputError(f"{place}: column '{column}': an empty list; expected one message or more")
    messages = [_message(item, f"{place}: column '{column}', message {n}") for n, item in enumerate(value, start=1)]
    if messages[-1]["role"] != "user":
        raise InputError(
            f"{place}: column '{column}': the last turn is '{messages[-1]['role']}', expected 'user'. "
            "Leave the answer out of the messages (an answer to learn from goes into the reference column)"
        )
    return messages


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        found = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else _kind(item)
        raise InputError(f"{place}: expected {{role, content}}, found {found}")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise InputError(f"{place}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{place}: content: expected text, found {_kind(content)}")
    if not content.strip():
        raise InputError(f"{place}: the text is empty; expected a prompt. Fill it in or remove the row")
    return {"role": role, "content": without_surrogates(content)}


def _prompt_id(row: Mapping[str, Any], messages: Sequence[Message], place: str) -> str:
    if "prompt_id" not in row:
        return prompt_id_of(messages)
    name = row["prompt_id"]
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"{place}: prompt_id: expected text that is not empty, found {name!r}; leave it out to get one"
        )
    return name


def _task(row: Mapping[str, Any], place: str) -> str | None:
    task = row.get("task")
    if task is not None and not isinstance(task, str):
        raise InputError(f"{place}: task: expected a name, found {_kind(task)}")
    return task


def _reference(raw: Mapping[str, Any], column: str, required: bool, place: str) -> str | None:
    if required and column not in raw:
        raise InputError(
            f"{place}: no column '{column}' (prompts.reference_column); found columns: {', '.join(map(str, raw))}"
        )
    value = raw.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{place}: reference column '{column}': expected text or a number, found {_kind(value)}")


def _metadata(row: Mapping[str, Any], used: set[str]) -> str | None:
    """Columns not used elsewhere, as JSON text. A `metadata` column that is an object is laid under them."""
    kept = {key: value for key, value in row.items() if key not in used}
    if "metadata" in row:
        inner = _as_object(row["metadata"])
        kept = {"metadata": row["metadata"], **kept} if inner is None else {**inner, **kept}
    text = json.dumps(kept, ensure_ascii=False, sort_keys=True, default=str)
    return without_surrogates(text) if kept else None


def _as_object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return dict(value) if isinstance(value, Mapping) else None


def _check_task(prompt: Mapping[str, Any], row: Mapping[str, Any], place: str) -> None:
    """What the task's verifier will need must be there: found now, not after the proposals are paid for."""
    metadata = json.loads(prompt["metadata"]) if prompt["metadata"] else {}
    if prompt["task"] == "constraints":
        if "constraints" not in metadata:
            raise InputError(f"{place}: task 'constraints' needs a column 'constraints'; found {', '.join(row)}")
        try:
            parse_all(metadata["constraints"])
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    if prompt["task"] == "numeric" and final_number(prompt["reference"] or "") is None:
        raise InputError(
            f"{place}: task 'numeric' needs a reference with a number in it, found {prompt['reference']!r}. Name its "
            f"column in prompts.reference_column; found columns: {', '.join(map(str, row))}"
        )


def _refuse_duplicate(prompt_id: str, place: str, has_own_id: bool, places: dict[str, tuple[str, bool]]) -> None:
    if prompt_id not in places:
        places[prompt_id] = (place, has_own_id)
        return
    first, first_has_own_id = places[prompt_id]
    if has_own_id or first_has_own_id:
        raise InputError(f"{place}: prompt_id {prompt_id!r} is already used at {first}; ids must be unique")
    raise InputError(
        f"{place}: the same conversation as at {first} (both get prompt_id {prompt_id}). Remove one of them, or give "
        "each row a prompt_id of its own"
    )


def _kind(value: Any) -> str:
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open_source(config: PromptsConfig, seed: int) -> Iterator[Placed]:
    source = config.source
    kind, _, rest = source.partition(":")
    if kind == "packaged":
        return _packaged(rest)
    if kind == "hub":
        return _hub(rest)
    if kind == "reasoning_gym":
        return _reasoning_gym(rest, config.limit or NUM_REASONING_GYM, seed)
    if source.endswith(".jsonl"):
        return _jsonl(source)
    if source.endswith(".parquet"):
        return _parquet(source)
    raise InputError(f"prompts.source {source}: neither a known kind nor a known suffix; expected {SOURCES}")


def _packaged(name: str) -> Iterator[Placed]:
    if name != "constraints":
        raise InputError(f"prompts.source packaged:{name}: no such prompts in the package; expected constraints")
    with resources.as_file(resources.files("aft_ray.data") / "constraints.jsonl") as path:
        yield from _jsonl(str(path))


def _open_file(source: str) -> Any:
    import pyarrow as pa
    from pyarrow import fs

    try:
        if "://" in source:
            system, path = fs.FileSystem.from_uri(source)
        else:
            system, path = fs.LocalFileSystem(), str(Path(source).expanduser().absolute())
        return system.open_input_file(path)
    except FileNotFoundError:
        raise InputError(f"prompts.source {source}: no such file. Expected {SOURCES}") from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"prompts.source {source}: cannot be opened: {error}") from None


def _jsonl(source: str) -> Iterator[Placed]:
    with _open_file(source) as file:
        for number, line in enumerate(io.BufferedReader(file), start=1):
            if line.strip():
                yield f"{source}:{number}", _json_line(line, f"{source}:{number}")


def _json_line(line: bytes, place: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text (byte {error.start}: {error.reason}). Save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: not readable as JSON ({error}); expected one JSON object per line, found {_excerpt(line)}"
        ) from None


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _parquet(source: str) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open_file(source) as file:
        try:
            batches = pq.ParquetFile(file).iter_batches(batch_size=256)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield f"{source}:row {number}", row
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"prompts.source {source}: not readable as Parquet: {error}") from None


def _hub(reference: str) -> Iterator[Placed]:
    import datasets

    dataset, _, split = reference.partition(":")
    name, _, config_name = dataset.partition("@")
    try:
        rows = datasets.load_dataset(name, config_name or None, split=split or "train")
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        cause = (str(error) or repr(error)).splitlines()[0]
        raise InputError(
            f"prompts.source hub:{reference}: cannot be loaded: {cause}. "
            "Check the name (hub:DATASET[@CONFIG][:SPLIT]) and the connection, or give a local .jsonl or .parquet file"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"hub:{reference}:row {number}", row


def _reasoning_gym(names: str, num_rows: int, seed: int) -> Iterator[Placed]:
    """Items of the named tasks in turn. Seed, size and index are kept: the scorer makes the item again from them."""
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            f"prompts.source reasoning_gym:{names}: reasoning_gym is not installed; pip install aft-ray[tasks]"
        ) from None

    tasks = [name.strip() for name in names.split(",") if name.strip()]
    if not tasks:
        raise InputError("prompts.source reasoning_gym: names no task; expected reasoning_gym:TASK[,TASK...]")
    size = -(-num_rows // len(tasks))
    try:
        items = {name: reasoning_gym.create_dataset(name, size=size, seed=seed) for name in tasks}
    except ValueError as error:
        raise InputError(f"prompts.source reasoning_gym:{names}: {error}") from None
    for index, name in itertools.product(range(size), tasks):
        entry = items[name][index]
        recipe = {"name": name, "seed": seed, "size": size, "index": index}
        row = {"prompt_id": f"{name}-{seed}-{index}", "question": entry["question"], "reference": entry["answer"]}
        yield f"reasoning_gym:{name}:{index}", {**row, "task": "reasoning_gym", "reasoning_gym": recipe}
