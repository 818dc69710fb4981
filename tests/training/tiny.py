"""The vocabulary of the tiny model, and functions that write the model and its training set."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.records import HELD_OUT, TRAIN, TRAINING_SET
from aft_ray.templates import ChatFormat, build_example

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
WORDS = ["river", "bridge", "bird", "hill", "town", "lamp", "seven", "under", "old", "green", "near", "small", "bright"]
WORDS += ["watch", "run", "the", "a", "of"]
ANSWER = "the old bridge watch over seven bright lamp"
NUM_ROWS = 24
"""Number of training rows per variant: three global batches of eight."""


def examples_of(model: Path) -> list[dict[str, Any]]:
    """Return the rows of two variants: prompts of many lengths with one answer, and held-out rows with another one."""
    chat_format = ChatFormat.load(str(model))
    chance = random.Random(0)
    rows = []
    for variant, longest in (("sft", 12), ("aft", 40)):
        for number in range(NUM_ROWS + 2):
            held_out = number >= NUM_ROWS
            words = " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, longest)))
            messages: Any = [{"role": "user", "content": words}]
            target = "a a a a" if held_out else ANSWER
            input_ids, labels = build_example(
                chat_format.prompt_ids(messages), chat_format.target_ids(messages, target)
            )
            rows.append(
                {
                    "example_id": f"p-{number}-{variant}",
                    "prompt_id": f"p-{number}",
                    "variant": variant,
                    "split": HELD_OUT if held_out else TRAIN,
                    "input_ids": input_ids,
                    "labels": labels,
                    "num_tokens": len(input_ids),
                    "prompt_text": words,
                    "target_text": target,
                    "length_action": None,
                }
            )
    return rows


def write_training_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    middle = len(rows) // 2
    for number, part in enumerate((rows[:middle], rows[middle:])):
        pq.write_table(pa.Table.from_pylist(part, schema=TRAINING_SET), folder / f"shard-{number:05d}.parquet")
    return folder


def write_model(
    folder: Path, *, eos: str = "<|im_end|>", hidden_size: int = 32, window: int = 128, tied: bool = False
) -> Path:
    """Write a two-layer Llama with four heads and random float32 weights. Turns end with <|im_end|> for any `eos`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "over", "Zebra", *WORDS]
    names += [] if eos in names else [eos]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=["<|im_start|>", *(["<|im_end|>"] if eos != "<|im_end|>" else [])],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
