"""The glossary in code: the records that flow between the rooms, and the Parquet columns of each stage.

Each prompt has one row, with its proposals nested in it. A stage adds columns and never removes any:

    prompts    prompt_id, messages, reference, task, metadata, split, responses
    proposals  + proposals[]
    scores     + score, score_error inside each proposal; scorer
    selection  + selected, selection_reason
    targets    + target, accepted_targets, pseudo_target, target_filter, length_action, candidates

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
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

TRAIN, HELD_OUT = "train", "held_out"
"""Values of `split`. Held-out prompts pass through every data stage; evaluation uses them, and training never does."""


class FunctionCall(TypedDict):
    """The function that a tool call names, with its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One tool call of an assistant's turn."""

    id: str
    type: str
    function: FunctionCall


class Message(TypedDict):
    """One turn of a conversation, with the keys of chat templates and the OpenAI API."""

    role: str
    content: str
    name: NotRequired[str]
    """Who speaks, where several do."""
    reasoning_content: NotRequired[str]
    """What the model thought before this answer of its own."""
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    """The call that this turn of the role `tool` is the result of."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Tokens that a model read and wrote, and what a remote endpoint charges for them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    """Every generated token: thinking, answers, and what came of answers that were lost."""
    cost_usd: float = 0.0
    num_estimated: int = 0
    """Number of answers whose tokens were counted or estimated here, because the endpoint gave no counts."""

    @property
    def counts(self) -> dict[str, Any]:
        """The four fields alone, of any record that has them."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Spent)}

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost_usd=self.cost_usd + other.cost_usd,
            num_estimated=self.num_estimated + other.num_estimated,
        )


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
    """`stop`, `length`, `error`, or what else an endpoint says, such as `content_filter`; None for a proposal that was
    not sampled."""
    num_prompt_tokens: int
    num_tokens: int
    """Number of generated tokens, those of the reasoning included."""
    reasoning: str | None = None
    """What the model thought before it answered. It is in no prompt."""
    num_reasoning_tokens: int = 0
    usage_estimated: bool = False
    """Whether the token counts are this package's own, because the endpoint gave none."""
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
    """The score, where a choice between candidates or a filter needs one (`Config.scores_targets`)."""
    num_candidates: int
    """Number of aggregations that the teacher wrote; this is the one that was kept."""
    num_accepted: int | None
    """Number of them that the verifier accepted, or None if the task has no verifier."""
    reasoning: str | None = None
    """What the teacher thought before it answered."""
    num_reasoning_tokens: int = 0
    usage_estimated: bool = False
    """Whether the token counts are this package's own, because the endpoint gave none."""


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
        ("reasoning", pa.string()),
        ("num_reasoning_tokens", pa.int64()),
        ("usage_estimated", pa.bool_()),
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
        ("reasoning", pa.string()),
        ("num_reasoning_tokens", pa.int64()),
        ("usage_estimated", pa.bool_()),
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
        pa.field("candidates", pa.list_(TARGET)),
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
        ("num_tokens", pa.int32()),
        ("prompt_text", pa.string()),
        ("target_text", pa.string()),
        ("length_action", pa.string()),
    ]
)


def all_text(message: Message) -> str:
    """Return everything in a message that a model reads, for estimates of its length."""
    calls = [f"{call['function']['name']} {call['function']['arguments']}" for call in message.get("tool_calls", [])]
    return " ".join(filter(None, (message.get("name"), message["content"], message.get("reasoning_content"), *calls)))


def to_row(record: Any) -> dict[str, Any]:
    """Return a record as a plain dict, for Parquet and Ray."""
    return dataclasses.asdict(record)


def prompt_id_of(messages: Sequence[Message]) -> str:
    """Return an id made from the content: a conversation gets the same id in any source and any order.

    Trivial variations share an id (`normal_text`). The id has 64 bits: the chance that any two of ten million
    conversations share one is 1 in 370,000.
    """
    normal = []
    for message in messages:
        rest = {key: value for key, value in message.items() if key not in {"role", "content"}}
        turn = [message["role"], normal_text(message["content"])]
        normal.append([*turn, rest] if rest else turn)
    return "p-" + fingerprint(normal)[:16]


CODE = re.compile(r"^(?:```|~~~|[ \t]+\S)", re.MULTILINE)
"""The beginning of a line that makes a text one with code."""


def normal_text(text: str) -> str:
    """Return a text without what nobody means: NFC, and a run of white space as one space.

    In a text with code, which has a fence or indented lines, white space has a meaning: there, line breaks and the
    beginning of each line stay, and so does everything within a fence.
    """
    text = unicodedata.normalize("NFC", text).strip()
    if not CODE.search(text):
        return " ".join(text.split())
    lines: list[str] = []
    is_code = False
    for line in text.splitlines():
        is_fence = line.lstrip().startswith(("```", "~~~"))
        if is_code or is_fence:
            lines.append(line.rstrip())
        elif line.strip() or (lines and lines[-1]):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(indent + " ".join(line.split()) if line.strip() else "")
        is_code ^= is_fence
    return "\n".join(lines).strip()


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
