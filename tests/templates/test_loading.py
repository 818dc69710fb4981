"""The tokenizer of a model, as every driver, replica and worker loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

from aft_ray.models import load_tokenizer

TEXT = "<|im_start|>user\nHow are you, Zoë? 12 + 7<|im_end|>"
LOAD = """
import sys
from aft_ray.engines.base import EngineInfo
from aft_ray.templates.loading import load_format
chat = load_format(EngineInfo(model="m", tokenizer=sys.argv[1], max_model_len=64))
chat.prompt_ids([{"role": "user", "content": "hi"}])
assert "torch" not in sys.modules
"""


def test_a_tokenizer_of_the_plain_class_is_the_one_that_transformers_chooses(chatml_tokenizer: str) -> None:
    own, chosen = load_tokenizer(chatml_tokenizer), AutoTokenizer.from_pretrained(chatml_tokenizer)
    assert type(own) is type(chosen)
    assert own.encode(TEXT) == chosen.encode(TEXT)
    assert (own.chat_template, own.eos_token_id, own.get_vocab()) == (
        chosen.chat_template,
        chosen.eos_token_id,
        chosen.get_vocab(),
    )


def test_it_is_loaded_without_torch(chatml_tokenizer: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, chatml_tokenizer], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_of_another_class_is_left_to_transformers(chatml_tokenizer: str, tmp_path: Path) -> None:
    for file in Path(chatml_tokenizer).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert type(load_tokenizer(str(tmp_path))) is type(AutoTokenizer.from_pretrained(str(tmp_path)))
