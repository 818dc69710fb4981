"""The rows of the training benchmarks: long prompts, as K proposals make them, and short targets."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"


def write_rows(folder: Path, num_rows: int, num_words: tuple[int, int], seed: int = 1) -> Path:
    """Write a training set of `num_rows` examples of variant `aft`, with `num_words` (least, most) in the prompt.

    Returns its folder. Targets have 20 to 40 words.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from aft_ray.models import resolve_model
    from aft_ray.records import TRAIN, TRAINING_SET
    from aft_ray.templates import ChatFormat, build_example

    chat_format = ChatFormat.load(resolve_model(MODEL))
    lines = resources.files("aft_ray.data").joinpath("constraints.jsonl").read_text().splitlines()
    words = " ".join(json.loads(line)["prompt"] for line in lines).split()
    draw = random.Random(seed)

    def text(fewest: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(fewest, most)))

    rows = []
    for number in range(num_rows):
        messages: Any = [{"role": "system", "content": text(20, 20)}, {"role": "user", "content": text(*num_words)}]
        target = text(20, 40)
        input_ids, labels = build_example(chat_format.prompt_ids(messages), chat_format.target_ids(messages, target))
        rows.append(
            {
                "example_id": f"p-{number}-aft",
                "prompt_id": f"p-{number}",
                "variant": "aft",
                "split": TRAIN,
                "input_ids": input_ids,
                "labels": labels,
                "num_tokens": len(input_ids),
                "prompt_text": "",
                "target_text": target,
                "length_action": None,
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=TRAINING_SET), folder / "shard-00000.parquet")
    return folder
