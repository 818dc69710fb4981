"""The glossary in code: what flows between the rooms, and the Parquet columns of each stage.

One row per prompt; its proposals are nested in it. A stage adds columns and never takes any away:

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
"""Values of `split`: held-out prompts go through every data stage, are never trained on, and are what is evaluated."""


class Message(TypedDict):
    """One turn of a conversation, as chat templates and the OpenAI API spell it."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """One draft answer to a prompt."""

    text: str
    source: str
    """`on-policy`: sampled from the model to be trained. `off-policy`: from a data set or another model."""
    model: str
    seed: int | None
    """The sampling seed, or None where the engine does not take one."""
    finish_reason: str | None
    """`stop`, `length`, `abort`, or `error`."""
    num_prompt_tokens: int
    num_tokens: int
    error: str | None = None
    round: int = 1
    """Round of AFT: 2 for proposals sampled from an adapter of the first round."""
    score: float | None = None
    score_error: str | None = None
    """Why `score` is None. An unscorable proposal never gets a made-up number."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The aggregation to learn: written by the teacher from prompt + selected proposals."""

    text: str
    model: str
    finish_reason: str | None
    num_tokens: int
    verified: bool | None
    """Whether the verifier accepted it; None where there is no verifier for the task."""
    score: float | None
    num_candidates: int
    """How many aggregations were written; this is the one kept."""
    num_accepted: int | None
    """How many of them the verifier accepted; None without a verifier."""


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
    """A record as a plain dict, the way Parquet and Ray carry it."""
    return dataclasses.asdict(record)


def prompt_id_of(messages: Sequence[Message]) -> str:
    """A stable id made from content: the same conversation gets the same id in any source and any order.

    Unicode is NFC-normalised and runs of whitespace count as one, so trivial re-typings share an id. 64 bits: among ten
    million conversations two share one by chance once in 370,000 runs.
    """
    normal = [(m["role"], " ".join(unicodedata.normalize("NFC", m["content"]).split())) for m in messages]
    return "p-" + fingerprint(normal)[:16]


def fingerprint(value: Any) -> str:
    """sha256 over canonical JSON: the identity of a config, an input or a template."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(run_seed: int, prompt_id: str, layer: int, index: int) -> int:
    """The sampling seed of one answer: a hash of everything that names it, below 2**31.

    Replicas that share one seeded generator draw correlated samples (vllm#50440); a derived seed gives every sample
    its own stream, whichever replica it lands on and in whatever order.
    """
    digest = hashlib.blake2b(f"{run_seed}/{prompt_id}/{layer}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF


def metadata_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's `metadata` column (JSON text) as a dict; empty where the source gave none."""
    return json.loads(row["metadata"]) if row.get("metadata") else {}
