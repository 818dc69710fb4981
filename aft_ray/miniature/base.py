"""The base model: a Llama of 0.86 million parameters whose words are numbers and signs, made by the training room.

    make_base(load_config(Path("configs/miniature/base.yaml")), Path("configs/miniature/base"))

A document is several question-answer pairs behind each other, and every token of it but the first is in the loss:

    <|user|>07+13*02-19*05<|assistant|>07,00,00,01,05<|end|><|user|>...

The tokenizer gets its chat template when pretraining is over, as real base models get theirs: documents are no
conversations with a prompt outside the loss. The finished weights are kept in bfloat16.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aft_ray.config import Config
from aft_ray.data.arithmetic import MODULUS, Pair, documents
from aft_ray.errors import ConfigError
from aft_ray.pipeline.cluster import RaySession
from aft_ray.pipeline.steps import show_training
from aft_ray.progress import Progress
from aft_ray.records import TRAIN, TRAINING_SET
from aft_ray.runs import Run
from aft_ray.storage import Folder, whole_folder
from aft_ray.templates import IGNORE
from aft_ray.training import TrainingJob, train_adapters

USER, ASSISTANT, END, PAD, UNKNOWN = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>", "<|unknown|>"
NUMBERS = [f"{number:02d}" for number in range(MODULUS)]
SIGNS = "0123456789+-*,[]"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}<|user|>{{ message.content }}"
    "{%- elif message.role == 'assistant' -%}<|assistant|>{{ message.content }}<|end|>"
    "{%- else -%}{{ message.content }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
WIDTH, NUM_LAYERS, NUM_HEADS, FEED_FORWARD, WINDOW = 128, 4, 4, 384, 256
INITIALIZER_RANGE = 0.04
"""Standard deviation of the first weights; 0.02, the usual one, learns later at this width."""
VARIANT = "documents"


def make_base(config: Config, output: Path) -> None:
    """Pretrain the base model of `config` in its run folder and write it to `output`. Continues where it stopped.

    Read from the config: `run`, `prompts.limit` (documents) and `training`.
    """
    if not Folder.at(config.run.dir).is_local:
        raise ConfigError(f"run.dir {config.run.dir}: the base model of the miniature is made in a local folder")
    run = Run.open(config)
    folder = Path(run.folder.path)
    fresh = folder / "fresh"
    if not fresh.is_dir():
        write_fresh_model(fresh, config.run.seed)
    if not run.folder.child("training_set").names(".parquet"):
        write_documents(run.folder.child("training_set"), fresh, config.prompts.limit or 1000, config.run.seed)
    job = TrainingJob(
        config=config.training,
        model=str(fresh),
        training_set=run.folder.child("training_set"),
        outputs={VARIANT: run.folder.child(f"model/{VARIANT}")},
        checkpoints=run.folder.child("checkpoints"),
        seed=config.run.seed,
    )
    with RaySession(config) as session, Progress("pretraining", total=0, unit="steps") as progress:
        session.connect()
        train_adapters(job, report=partial(show_training, progress, {}))
    write_base(folder / "model" / VARIANT, output)


def write_fresh_model(folder: Path, seed: int) -> None:
    """A model folder with random weights and the tokenizer, which has no chat template yet."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed % 2**32)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=WINDOW,
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def make_tokenizer() -> Any:
    """One token per two-digit number, per sign, and per mark around a turn."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = [PAD, UNKNOWN, USER, ASSISTANT, END]
    vocabulary = {token: number for number, token in enumerate([*marks, *NUMBERS, *SIGNS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def write_documents(folder: Folder, model: Path, num_documents: int, seed: int) -> None:
    """The pretraining corpus as one shard of a training set."""
    import pyarrow as pa
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        document_row(f"document-{number}", pairs, tokenizer)
        for number, pairs in enumerate(itertools.islice(documents(seed), num_documents))
    ]
    folder.write_table("shard-00000.parquet", pa.Table.from_pylist(rows, schema=TRAINING_SET))


def document_row(name: str, pairs: Sequence[Pair], tokenizer: Any) -> dict[str, Any]:
    """One document as a row of `records.TRAINING_SET`, every token but the first in the loss."""
    text = "".join(f"{USER}{question}{ASSISTANT}{answer}{END}" for question, answer in pairs)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = dict.fromkeys(TRAINING_SET.names)
    identity = {"example_id": name, "prompt_id": name, "variant": VARIANT, "split": TRAIN}
    tokens = {"input_ids": ids, "labels": [IGNORE, *ids[1:]], "num_tokens": len(ids)}
    return {**row, **identity, **tokens, "prompt_text": "", "target_text": text}


def write_base(trained: Path, output: Path) -> None:
    """The trained model in bfloat16, with the chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with whole_folder(output) as partial:
        AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(partial)
        tokenizer = AutoTokenizer.from_pretrained(trained)
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(partial)
        shutil.rmtree(output, ignore_errors=True)
