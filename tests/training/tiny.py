"""The vocabulary of the tiny model, and functions that write the model and its training set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aft_ray.records import TRAINING_SET

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
WORDS = ["river", "bridge", "bird", "hill", "town", "lamp", "seven", "under", "old", "green", "near", "small", "bright"]
WORDS += ["watch", "run", "the", "a", "of"]
ANSWER = "the old bridge watch over seven bright lamp"
NUM_ROWS = 24
"""Number of training rows per variant: three global batches of eight."""


def write_training_set(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    middle = len(rows) // 2
    for number, part in enumerate((rows[:middle], rows[middle:])):
        pq.write_table(pa.Table.from_pylist(part, schema=TRAINING_SET), folder / f"shard-{number:05d}.parquet")
    return folder


def write_model(folder: Path, *, eos: str = "<|im_end|>", hidden_size: int = 32, window: int = 128) -> Path:
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
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
