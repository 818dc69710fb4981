"""Plain transformers, plain peft and vLLM load an exported folder and answer as the trained model does."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import ANSWER, TEMPLATE, write_model, write_training_set

from aft_ray.cli import app, guarded
from aft_ray.config import LoraSettings, TrainingConfig, TransformersEngineConfig, VllmEngineConfig, load_config
from aft_ray.errors import TrainingFailed
from aft_ray.models import resolve_model
from aft_ray.pipeline.preview import show_first_batch
from aft_ray.storage import Folder
from aft_ray.templates import ChatFormat
from aft_ray.training import TrainingJob, check_before_training
from aft_ray.training.adapter import finish_folder, partial_output
from aft_ray.training.export import export_model, find_trained, rounded
from aft_ray.training.loading import with_lora
from aft_ray.training.rows import first_examples, shard_hashes
from aft_ray.training.task import TrainSummary, TrainTask, task_settings
from tests.hub import Hub, put_in_cache

SMALL = 1e-4
"""A learning rate at which the adapter changes weights by less than half a step of bfloat16."""
QUESTION: Any = [{"role": "user", "content": "the green hill near a small town"}]


class FinishedRun:
    """A run folder with a trained adapter, as `aft-ray run --until train` leaves it."""

    def __init__(self, folder: Path, model: Path | str, examples: list[dict[str, Any]]) -> None:
        self.folder, self.model = folder, model
        folder.mkdir(exist_ok=True)
        self.training_set = write_training_set(folder / "training_set", examples)
        self.file = folder / "run.yaml"
        engine = {"type": "transformers", "model": str(model)}
        self.file.write_text(yaml.safe_dump({"run": {"dir": str(folder)}, "engine": engine}))

    def finish(self, trained: Any, variant: str = "aft") -> Path:
        """Write the adapter or model into the folder that training would write."""
        job = TrainingJob(
            config=TrainingConfig(bf16=False),
            model=str(self.model),
            training_set=Folder.at(self.training_set),
            outputs={variant: Folder.at(self.folder / "model" / variant)},
            checkpoints=Folder.at(self.folder / "checkpoints"),
            seed=1,
            template_hashes={"a": "h-4711"},
        )
        task = TrainTask(
            variant=variant,
            output=job.outputs[variant],
            checkpoints=job.checkpoints,
            settings=task_settings(job, shard_hashes(job.training_set), resolve_model(str(self.model)), variant),
            num_rows=24,
            num_steps=40,
        )
        folder = partial_output(task, self.folder)
        trained.save_pretrained(folder)
        numbers = dict(num_tokens=9, num_trained_tokens=4, first_loss=3.0, last_loss=0.1, seconds=1.0, world_size=2)
        more = dict(startup_seconds=1.0, tokens_per_second=9.0, resumed_from_step=0, num_rows=24, num_steps=40)
        perplexity = {"held_out_perplexity": {"aft": 2.345}}
        finish_folder(
            task,
            job,
            resolve_model(str(self.model)),
            TrainSummary(variant=variant, adapter_path=task.output.path, **numbers, **more, **perplexity),  # type: ignore[arg-type]
            folder,
        )
        return Path(task.output.path)

    def export(self, output: Path, *flags: str) -> int:
        """Run `aft-ray export` in this process and return its exit code."""
        arguments = ["export", "--config", str(self.file), "--output", str(output), *flags]
        return guarded(lambda: app(arguments, standalone_mode=False))


def with_adapter(model: Path, training_set: Path, num_steps: int, *, learning_rate: float = 2e-2, **lora: Any) -> Any:
    """Train a LoRA on the `aft` rows in plain PyTorch and return the model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    torch.manual_seed(3)
    settings: Any = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    adapted: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(**settings)
    )
    rows = [
        {"input_ids": row["input_ids"], "labels": row["labels"]}
        for row in first_examples(Folder.at(training_set), "aft", 1000)
    ]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=learning_rate)
    for _ in range(num_steps):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


@pytest.fixture(scope="module")
def run(examples: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A model with heads of size 32, for which vLLM has a CPU kernel, and an eos that does not end a turn."""
    model = write_model(tmp_path_factory.mktemp("model"), eos="<|endoftext|>", hidden_size=128)
    run = FinishedRun(tmp_path_factory.mktemp("run"), model, examples)
    run.finish(with_adapter(model, run.training_set, 40))
    return run


def test_the_first_batch_is_shown_with_its_trained_tokens_marked(
    run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    show_first_batch(load_config(run.file, ["training_set.variants=[aft]"]))
    shown = capsys.readouterr().out
    assert "aft: first step, 4 rows" in shown
    assert shown.count("«" + ANSWER.replace(" ", "") + "<|im_end|>»") == 4


@pytest.fixture(scope="module")
def exported(run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "adapter"
    assert run.export(output) == 0
    return output


@pytest.fixture(scope="module")
def merged(run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "merged"
    assert run.export(output, "--merged") == 0
    return output


def logits(model: Any, run: FinishedRun) -> torch.Tensor:
    ids = torch.tensor([first_examples(Folder.at(run.training_set), "aft", 1)[0]["input_ids"]])
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


def adapted_logits(run: FinishedRun, adapter: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, str(adapter)), run)


def test_an_adapter_is_not_merged_into_other_weights_of_the_same_shapes(
    examples: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = write_model(tmp_path / "model")
    (tmp_path / "run").mkdir()
    own = FinishedRun(tmp_path / "run", model, examples)
    own.finish(with_adapter(model, own.training_set, 1))
    with_other_weights: Any = AutoModelForCausalLM.from_pretrained(model)
    for weight in with_other_weights.parameters():
        weight.data *= 1.01
    with_other_weights.save_pretrained(model)
    assert own.export(tmp_path / "merged", "--merged") == 2
    assert "is not the model that" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_the_merged_folder_gives_the_logits_of_base_and_adapter_in_plain_transformers(
    run: FinishedRun, merged: Path
) -> None:
    from transformers import AutoModelForCausalLM

    assert not list(merged.glob("adapter_*"))
    found = logits(AutoModelForCausalLM.from_pretrained(merged), run)
    expected = adapted_logits(run, run.folder / "model" / "aft")
    assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3)
    base = logits(AutoModelForCausalLM.from_pretrained(run.model), run)
    assert not torch.allclose(base, expected, atol=1.0)


def test_the_adapter_folder_gives_the_same_logits_in_plain_peft(run: FinishedRun, exported: Path) -> None:
    assert torch.equal(adapted_logits(run, exported), adapted_logits(run, run.folder / "model" / "aft"))


@pytest.mark.parametrize("form", ["exported", "merged"])
def test_the_end_of_turn_stops_generation_and_the_chat_template_is_the_runs(
    form: str, run: FinishedRun, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    folder: Path = request.getfixturevalue(form)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends
    assert GenerationConfig.from_pretrained(run.model).eos_token_id == ends[1]
    assert (folder / "tokenizer.json").read_bytes() == (run.folder / "model/aft/tokenizer.json").read_bytes()


def generated(model: Path) -> list[int]:
    """Return the greedy answer of plain transformers, with the generation settings of the folder."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([ChatFormat.load(str(model)).prompt_ids(QUESTION)])
    made = AutoModelForCausalLM.from_pretrained(model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
    )
    return made[0, ids.shape[1] :].tolist()


def test_plain_generation_ends_where_the_targets_did(merged: Path) -> None:
    tokenizer = ChatFormat.load(str(merged)).tokenizer
    assert tokenizer.convert_ids_to_tokens(generated(merged)) == [*ANSWER.split(), "<|im_end|>"]


def test_the_card_tells_what_it_is_made_from_and_how_merging_went(run: FinishedRun, merged: Path) -> None:
    card = (merged / "model_card.md").read_text()
    stored = json.loads((merged / "summary.json").read_text())
    for words in ("# aft merged model", str(run.model), "h-4711", stored["fingerprint"], "learning_rate", "2.345"):
        assert words in card
    assert "| dtype | `float32` |" in card
    assert "loss when reloaded" in card
    assert "## Merging" not in (run.folder / "model" / "aft" / "model_card.md").read_text()


def test_exports_name_the_hubs_base_model_and_its_commit_instead_of_a_path(
    run: FinishedRun, examples: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "d" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = put_in_cache(tmp_path / "hub", "owner/tiny", Path(run.model), commit, "v1")
    of_hub = FinishedRun(tmp_path / "run", "owner/tiny#v1", examples)
    of_hub.finish(with_adapter(snapshot, of_hub.training_set, 2))
    assert of_hub.export(tmp_path / "exports" / "adapter") == 0
    assert of_hub.export(tmp_path / "exports" / "merged", "--merged") == 0
    written = json.loads((tmp_path / "exports" / "adapter" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/tiny", commit)
    for form in ("adapter", "merged"):
        card = (tmp_path / "exports" / form / "model_card.md").read_text()
        assert "| base model | `owner/tiny` |" in card
        assert f"| revision of the base model | `{commit}` |" in card
    texts = {file: file.read_text() for file in (tmp_path / "exports").rglob("*") if file.suffix in {".json", ".md"}}
    assert [file.name for file, text in texts.items() if str(tmp_path / "hub") in text] == []
    merge_base = find_trained(load_config(of_hub.file, ["engine.model=owner/tiny"]), None, "").base
    assert merge_base == str(snapshot), "a merge takes the commit that was trained on, whatever is the newest"


def test_a_base_model_gets_the_tokens_of_its_chat_template_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from tests.templates.families import make_tokenizer

    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer("base")
    tokenizer.save_pretrained("owner/base-model")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small)).save_pretrained("owner/base-model")
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    exec(page.partition("```python\n")[2].partition("```")[0], {})
    chat_format = ChatFormat.load("base-with-tokens", style="chat", chat_template="chatml")
    [start, *_, end] = chat_format.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert chat_format.prompt_ids(QUESTION)[0] == start >= len(tokenizer)
    assert chat_format.target_ids(QUESTION, "Good day")[-1] == end
    base = AutoModelForCausalLM.from_pretrained("base-with-tokens")
    assert base.get_input_embeddings().weight.shape[0] == len(tokenizer) + 2
    config = TrainingConfig(lora=LoraSettings(modules_to_save=("embed_tokens", "lm_head")))
    check_before_training(config, "base-with-tokens", 128)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_are_trained_whole_are_merged_too(
    tied: bool, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from aft_ray.engines.transformers import TransformersEngine

    model = write_model(tmp_path / "model", tied=tied)
    whole = FinishedRun(tmp_path / "run", model, examples)
    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    settings = LoraSettings(rank=4, modules_to_save=tuple(saved))
    _, lora = with_lora(TrainingConfig(lora=settings), AutoModelForCausalLM.from_pretrained(model))
    assert lora.ensure_weight_tying == tied
    trained = with_adapter(model, whole.training_set, 10, modules_to_save=saved, ensure_weight_tying=tied)
    folder = whole.finish(trained)
    expected = adapted_logits(whole, folder)
    assert whole.export(tmp_path / "merged", "--merged") == 0
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged, whole), expected, atol=1e-3, rtol=1e-3)
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    for layer in ("get_input_embeddings", "get_output_embeddings"):
        assert not torch.allclose(getattr(merged, layer)().weight, getattr(base, layer)().weight, atol=1e-3)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied

    engine = TransformersEngine(TransformersEngineConfig(model=str(model), dtype="float32"))
    engine._use_adapter(str(folder))
    assert torch.allclose(logits(engine.model, whole), expected, atol=1e-3, rtol=1e-3)
    engine._use_adapter(None)
    assert torch.allclose(logits(engine.model, whole), logits(base, whole), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("form", ["exported", "merged"])
def test_the_same_export_again_says_so_and_writes_nothing(
    form: str, run: FinishedRun, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(form)
    flags = ("--merged",) if form == "merged" else ()
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert run.export(folder, *flags) == 0
    assert "there already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("form", ["exported", "merged"])
def test_what_is_pushed_to_the_hub_is_what_is_exported(
    form: str, run: FinishedRun, hub: Hub, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(form)
    what = {"exported": "adapter", "merged": "merged"}[form]
    arguments = ["push", "me/mine", "--config", str(run.file), "--what", what]
    assert guarded(lambda: app(arguments, standalone_mode=False)) == 0
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.files == {"models/me/mine": expected}
    assert sum(name.endswith(".safetensors") for name in expected) == len(hub.large) == 1
    assert hub.created[0].get("type") in {None, "model"}
    assert f"files are at {hub.url}/me/mine" in capsys.readouterr().out


def test_a_folder_with_anything_else_is_refused_and_left_alone(
    run: FinishedRun, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert run.export(tmp_path) == 2
    assert run.export(exported, "--merged") == 2
    assert "name another folder, or remove this one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_a_killed_export_left_is_written_anew(run: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half.safetensors").write_text("half")
    assert run.export(tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "half.safetensors").exists()


def test_a_run_that_is_not_trained_names_the_command(
    run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.export(tmp_path / "out", "--set", f"run.dir={tmp_path}/none") == 2
    command = f"aft-ray run --config {run.file} --set run.dir={tmp_path}/none --until train"
    assert f"nothing is trained yet; run: {command}" in capsys.readouterr().err
    assert run.export(tmp_path / "out", "--variant", "sft") == 2
    assert "--variant sft: not trained" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_of_several_variants_has_to_be_named(
    run: FinishedRun, examples: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    several = FinishedRun(tmp_path / "run", run.model, examples)
    for variant in ("sft", "aft"):
        shutil.copytree(run.folder / "model" / "aft", several.folder / "model" / variant)
    assert several.export(tmp_path / "out") == 2
    assert "holds several variants (aft, sft): name one with --variant" in capsys.readouterr().err
    assert several.export(tmp_path / "out", "--variant", "sft") == 0


def test_another_base_model_than_the_trained_one_is_refused(
    run: FinishedRun, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.export(tmp_path / "out", "--merged", "--set", f"engine.model={tiny_model}") == 2
    assert "is not the model that" in capsys.readouterr().err


def test_a_whole_model_is_copied_merged_or_not(
    run: FinishedRun, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "run").mkdir()
    full = FinishedRun(tmp_path / "run", run.model, examples)
    trained = AutoModelForCausalLM.from_pretrained(run.model)
    full.finish(trained)
    assert full.export(tmp_path / "a") == full.export(tmp_path / "b", "--merged") == 0
    for output in (tmp_path / "a", tmp_path / "b"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(output), run), logits(trained, run))
        assert len(json.loads((output / "generation_config.json").read_text())["eos_token_id"]) == 2
    assert full.export(tmp_path / "b") == 0, "merged or not, a whole model is the same export"


def test_a_small_change_survives_merging_in_bfloat16(
    run: FinishedRun, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Rounding to the nearest bfloat16, as peft alone does, would lose most of it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(run.model).save_pretrained(tmp_path / "base")
    (tmp_path / "run").mkdir()
    small = FinishedRun(tmp_path / "run", tmp_path / "base", examples)
    small.finish(with_adapter(small.model, small.training_set, 3, learning_rate=SMALL))
    assert small.export(tmp_path / "out", "--merged") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight), "no adapter on it"

    adapter = small.folder / "model" / "aft"
    exact, nearest = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small.model, dtype=dtype), adapter)
        for dtype in (torch.float32, torch.bfloat16)
    )
    before, change = weights(base), weights(exact.merge_and_unload()) - weights(base)
    kept, kept_by_nearest = (
        ((weights(model) - before) @ change / (change @ change)).item()
        for model in (merged, nearest.merge_and_unload())
    )

    assert kept == pytest.approx(1, abs=0.05)
    assert kept_by_nearest < 0.6


def weights(model: Any) -> torch.Tensor:
    """Return all weights in one row."""
    return torch.cat([weight.detach().float().flatten() for weight in model.parameters()])


def test_rounding_is_right_on_average_and_leaves_exact_values_alone() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    assert torch.equal(rounded(exact.float(), torch.bfloat16, torch.Generator()), exact)
    step = 2**-7  # between bfloat16 numbers from 1 to 2
    for value in (1 + 0.1 * step, -(1 + 0.7 * step)):
        found = rounded(torch.full((100_000,), value), torch.bfloat16, torch.Generator().manual_seed(2)).float()
        assert set(found.abs().tolist()) == {1.0, 1.0 + step}
        assert found.mean().item() == pytest.approx(value, abs=0.01 * step)


def test_a_merge_that_changes_the_model_is_not_exported(examples: list[dict[str, Any]], tmp_path: Path) -> None:
    """Float16 ends at 65,504, and the adapter adds more than that."""
    from transformers import AutoModelForCausalLM

    model = write_model(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).save_pretrained(model)
    (tmp_path / "run").mkdir()
    run = FinishedRun(tmp_path / "run", model, examples)
    adapted = with_adapter(model, run.training_set, 0, target_modules=["gate_proj"])
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.fill_(1000)
    run.finish(adapted)
    with pytest.raises(
        TrainingFailed, match=r"saved in float16, the model has loss nan .* base model and adapter have"
    ):
        export_model(find_trained(load_config(run.file), None, "aft-ray run"), tmp_path / "out", merged=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.soak
@pytest.mark.model
def test_vllm_gives_the_tokens_of_transformers_and_stops_as_it_does(merged: Path, run: FinishedRun) -> None:
    from aft_ray.engines import GenerateRequest, Sample, Sampling, build_engine

    async def answer() -> Sample:
        engine = build_engine(
            VllmEngineConfig(model=str(merged), max_model_len=128, dtype="float32", max_lora_rank=0, max_num_seqs=4)
        )
        request = GenerateRequest(
            request_id="merged",
            prompt_ids=tuple(ChatFormat.load(str(merged)).prompt_ids(QUESTION)),
            messages=QUESTION,
            sampling=Sampling(temperature=0.0, max_tokens=32),
            seeds=(1,),
        )
        samples = [event async for event in engine.generate(request) if isinstance(event, Sample)]
        await engine.close()
        return samples[0]

    sample = asyncio.run(asyncio.wait_for(answer(), 300))
    assert list(sample.token_ids) == generated(merged)
    assert sample.finish_reason == "stop"
    assert sample.text == ANSWER.replace(" ", ""), "the tokenizer's decoder puts words together"
