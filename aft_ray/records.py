"""The glossary in code: the records that flow between the rooms, and the Parquet columns of each stage.

Each prompt has one row, with its proposals nested in it. A stage adds columns and never removes any:

    prompts    prompt_id, messages, reference, task, metadata, split, responses
    proposals  + proposals[]
    scores     + score, score_error inside each proposal; scorer
    selection  + selected, selection_reason
    targets    + target, accepted_targets, pseudo_target, target_filter, length_action

Example row after `selection` (K = 2 of 3 proposals):

    {"prompt_id": "p-5f0c2a91d3b7", "messages": [{"role": "user", "content": "Name three rivers."}],
     "reference": None, "task": "constraints", "metadata": "{...json...}", "split": "train",
     "responses": None,
     "proposals": [{"text": "The Nile, ...", "score": 1.0, ...}, {...}, {...}],
     "scorer": "constraints", "selected": [0, 2], "selection_reason": "top_k"}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import pyarrow as pa

TRAIN, HELD_OUT = "train", "held_out"
"""Values of `split`. Held-out prompts pass through every data stage; evaluation uses them, and training never does."""


class Message(TypedDict):
    """One turn of a conversation, with the keys of chat templates and the OpenAI API."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One draft answer to a prompt."""

    text: str
    source: str
    """`on-policy`: sampled from the model to train. `off-policy`: from a data set or another model."""
    model: str
    seed: int | None
    """The sampling seed, or None if the engine takes none."""
    finish_reason: str | None
    """`stop`, `length`, `abort` or `error`; None for a proposal that was not sampled."""
    num_prompt_tokens: int
    num_tokens: int
    error: str | None = None
    round: int = 1
    """Round of AFT, for example 2 for proposals sampled from an adapter of the first round."""
    score: float | None = None
    score_error: str | None = None
    """The reason why `score` is None. A proposal that cannot be scored never gets a number."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The aggregation to learn, written by the teacher from the prompt and its selected proposals."""

    text: str
    model: str
    finish_reason: str | None
    num_tokens: int
    verified: bool | None
    """Whether the verifier accepted the text, or None if the task has no verifier."""
    score: float | None
    num_candidates: int
    """Number of aggregations that the teacher wrote; this is the one that was kept."""
    num_accepted: int | None
    """Number of them that the verifier accepted, or None if the task has no verifier."""


MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
PROPOSAL = pa.struct(
    [
        ("text", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("seed", pa.int64()),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int64()),
        ("num_tokens", pa.int64()),
        ("error", pa.string()),
        ("round", pa.int64()),
        ("score", pa.float64()),
        ("score_error", pa.string()),
    ]
)
TARGET = pa.struct(
    [
        ("text", pa.string()),
        ("model", pa.string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("verified", pa.bool_()),
        ("score", pa.float64()),
        ("num_candidates", pa.int64()),
        ("num_accepted", pa.int64()),
    ]
)
RESPONSE = pa.struct([("text", pa.string()), ("model", pa.string()), ("score", pa.float64())])

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("reference", pa.string()),
        ("task", pa.string()),
        ("metadata", pa.string()),
        ("split", pa.string()),
        ("responses", pa.list_(RESPONSE)),
    ]
)
PROPOSALS = PROMPTS.append(pa.field("proposals", pa.list_(PROPOSAL)))
SCORES = PROPOSALS.append(pa.field("scorer", pa.string()))
SELECTION = SCORES.append(pa.field("selected", pa.list_(pa.int64()))).append(pa.field("selection_reason", pa.string()))
TARGETS = pa.schema(
    [
        *SELECTION,
        pa.field("target", TARGET),
        pa.field("accepted_targets", pa.list_(TARGET)),
        pa.field("pseudo_target", TARGET),
        pa.field("target_filter", pa.string()),
        pa.field("length_action", pa.string()),
    ]
)
TRAINING_SET = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("variant", pa.string()),
        ("split", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("prompt_text", pa.string()),
        ("target_text", pa.string()),
        ("length_action", pa.string()),
    ]
)


def to_row(record: Any) -> dict[str, Any]:
    """Return a record as a plain dict, for Parquet and Ray."""
    return dataclasses.asdict(record)


def prompt_id_of(messages: Sequence[Message]) -> str:
    """Return an id made from the content: a conversation gets the same id in any source and any order.

    Unicode is NFC-normalised and a run of white space counts as one space, so trivial variations share an id. The id
    has 64 bits: the chance that any two of ten million conversations share one is 1 in 370,000.
    """
    normal = [(m["role"], " ".join(unicodedata.normalize("NFC", m["content"]).split())) for m in messages]
    return "p-" + fingerprint(normal)[:16]


def fingerprint(value: Any) -> str:
    """Return the sha256 of the value as canonical JSON. It identifies a config, an input or a template."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(run_seed: int, prompt_id: str, layer: int, index: int) -> int:
    """Return the sampling seed of one answer: a hash of everything that identifies it, below 2**31.

    Replicas that share one seeded generator draw correlated samples (vllm#50440). A derived seed gives every sample its
    own random stream, whichever replica makes it and in whatever order.
    """
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}/{layer}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF


def metadata_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row's `metadata` column (JSON text) as a dict, empty if the source gave none."""
    return json.loads(row["metadata"]) if row.get("metadata") else {}
