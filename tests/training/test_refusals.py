"""Settings that cannot work together are refused before anything starts, with the reason."""

from __future__ import annotations

import graphlib
import importlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model, write_training_set

from aft_ray.config import LoraSettings, TrainingConfig, load_config
from aft_ray.errors import ConfigError, InputError, ResumeRefused, StorageError, TrainingFailed
from aft_ray.pipeline.checks import check_before_start
from aft_ray.storage import Folder
from aft_ray.training import TrainingJob, check_before_training, train_adapters
from aft_ray.training.identity import adapter_identity, model_identity
from aft_ray.training.run import plan_training
from tests.hub import put_in_cache


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BloomConfig", "BloomForCausalLM takes no position ids"),
        ("MambaConfig", "MambaForCausalLM takes no position ids"),
        ("JambaConfig", "JambaForCausalLM has a recurrent state that continues"),
    ],
)
def test_packing_is_refused_for_a_model_that_carries_one_example_into_the_next(
    name: str, reason: str, tmp_path: Path
) -> None:
    import transformers

    getattr(transformers, name)().save_pretrained(tmp_path / "model")
    check_before_training(TrainingConfig(), str(tmp_path / "model"))
    with pytest.raises(ConfigError, match=f"training.pack_length: {reason}"):
        check_before_training(TrainingConfig(pack_length=64), str(tmp_path / "model"))
    run = tmp_path / "run.yaml"
    run.write_text(
        json.dumps({"run": {"dir": "x"}, "engine": {"type": "transformers", "model": str(tmp_path / "model")}})
    )
    with pytest.raises(ConfigError, match=reason):  # and so before the first stage of a run
        check_before_start(load_config(run, ["training.pack_length=8192"]))


def test_packing_is_allowed_where_attention_knows_positions(tiny_model: Path) -> None:
    check_before_training(TrainingConfig(pack_length=64), str(tiny_model))


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(tracker: Any, tiny_model: Path) -> None:
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed here")
    with pytest.raises(ConfigError, match=f"training.report_to: {tracker} is not installed here: pip install"):
        check_before_training(TrainingConfig(report_to=(tracker,)), str(tiny_model))


def test_a_second_round_keeps_its_adapters_shape(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    config = TrainingConfig(init_adapter=str(tmp_path), lora=LoraSettings(rank=8, alpha=16))
    with pytest.raises(ConfigError, match=r"init_adapter: no such file: .*adapter_config\.json"):
        check_before_training(config, str(tiny_model))
    LoraConfig(r=16, lora_alpha=16).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"init_adapter: no such file: .*adapter_model\.safetensors"):
        check_before_training(config, str(tiny_model))
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"training.lora.rank is 8, but training.init_adapter has 16"):
        check_before_training(config, str(tiny_model))
    LoraConfig(r=8, lora_alpha=16, modules_to_save=["embed_tokens"]).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"modules_to_save is \[\], but training.init_adapter has \['embed_tokens'\]"):
        check_before_training(config, str(tiny_model))
    LoraConfig(r=8, lora_alpha=16).save_pretrained(str(tmp_path))
    check_before_training(config, str(tiny_model))


@pytest.mark.parametrize("place", ["hub", "s3"])
def test_a_second_round_begins_with_an_adapter_from_elsewhere(
    place: str,
    tiny_model: Path,
    training_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from aft_ray.training.loading import with_lora

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    adapter: Any = get_peft_model(base(), LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("AFT_RAY_CACHE", str(tmp_path / "cache"))
    if place == "hub":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        put_in_cache(tmp_path / "hub", "owner/first-round", tmp_path / "adapter", "e" * 40, "v1")
        reference = "owner/first-round#v1"
    else:
        reference = f"{request.getfixturevalue('bucket')}/first-round"
        for file in (tmp_path / "adapter").iterdir():
            Folder.at(reference).write_bytes(file.name, file.read_bytes())
    config = TrainingConfig(init_adapter=reference, lora=LoraSettings(alpha=8))
    plan, _ = plan_training(job(config, tiny_model, training_set, tmp_path))
    assert plan.job.config.init_adapter == reference
    assert plan.tasks[0].settings["training"]["init_adapter"] == adapter_identity(str(tmp_path / "adapter"))
    loaded, _ = with_lora(plan.job.config, base())
    weights = dict(loaded.named_parameters())
    for name, weight in adapter.named_parameters():
        assert torch.equal(weight, weights[name]), name


def refused(config: dict[str, Any], model: Path, max_length: int = 128) -> str:
    with pytest.raises(ConfigError) as found:
        check_before_training(TrainingConfig.model_validate(config), str(model), max_length)
    return str(found.value)


def test_every_target_module_must_be_one_of_the_model(tiny_model: Path) -> None:
    names = {"lora": {"target_modules": ["q_proj", "gate_prj"]}}
    assert "LlamaForCausalLM has no module gate_prj; did you mean 'gate_proj'?" in refused(names, tiny_model)
    pattern = {"lora": {"target_modules": "q_proj"}}
    assert "'q_proj': this regular expression matches no module's full name" in refused(pattern, tiny_model)
    saved = {"lora": {"modules_to_save": ["embed_token"]}}
    assert "modules_to_save: LlamaForCausalLM has no module embed_token; did you mean 'embed_tokens'?" in refused(
        saved, tiny_model
    )
    for targets in (["q_proj", "mlp.gate_proj"], r".*\.(q|v)_proj", "all-linear"):
        config = TrainingConfig.model_validate({"lora": {"target_modules": targets}})
        check_before_training(config, str(tiny_model), 128)


def test_examples_longer_than_the_models_window_are_refused(
    tiny_model: Path, training_set: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert "training_set.max_length 129 > the window of" in refused({}, tiny_model, 129)
    short = write_model(tmp_path / "short", window=max(len(row["input_ids"]) for row in examples) - 1)
    with pytest.raises(ConfigError, match=r"longest example of variant aft has \d+ > the window of .*: \d+ tokens"):
        plan_training(job(TrainingConfig(), short, training_set, tmp_path))


def test_an_attention_that_the_models_class_lacks_is_refused(tmp_path: Path) -> None:
    import transformers

    transformers.GPTNeoConfig(attention_types=[[["global"], 1]], num_layers=1).save_pretrained(tmp_path)
    words = "training.attention sdpa: GPTNeoForCausalLM has none; set attention: auto"
    assert words in refused({"attention": "sdpa"}, tmp_path)
    check_before_training(TrainingConfig(), str(tmp_path), 128)


def test_held_out_losses_decide_only_where_they_are_measured(tiny_model: Path, tmp_path: Path) -> None:
    for name, value in (("early_stopping_patience", 2), ("load_best_model_at_end", True)):
        with pytest.raises(ValueError, match=f"{name} compares the losses of held-out examples: set eval_steps"):
            TrainingConfig.model_validate({name: value})


def test_a_training_set_without_held_out_examples_cannot_choose_the_best_state(
    tiny_model: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    trained = write_training_set(tmp_path / "set", [row for row in examples if row["split"] == "train"])
    config = TrainingConfig(load_best_model_at_end=True, eval_steps=5)
    with pytest.raises(ConfigError, match="need held-out examples, and variant aft has none"):
        plan_training(job(config, tiny_model, trained, tmp_path))


@pytest.mark.parametrize(("eval_steps", "is_said"), [(5, True), (1, False)], ids=["too seldom", "often"])
def test_early_stopping_that_comes_too_late_for_this_training_set_is_said(
    tiny_model: Path, examples: list[dict[str, Any]], tmp_path: Path, caplog: Any, eval_steps: int, is_said: bool
) -> None:
    """How many steps the epochs have is known only when the training set is there."""
    config = TrainingConfig(eval_steps=eval_steps, early_stopping_patience=1, num_epochs=1)
    plan_training(job(config, tiny_model, write_training_set(tmp_path / "set", examples), tmp_path))
    words = "variant aft: training.early_stopping_patience 1 with training.eval_steps 5 can stop a training at step 10"
    assert (words in caplog.text) == is_said


def job(config: TrainingConfig, model: Path, training_set: Path, folder: Path) -> TrainingJob:
    return TrainingJob(
        config=config,
        model=str(model),
        training_set=Folder.at(training_set),
        outputs={"aft": Folder.at(folder / "model")},
        checkpoints=Folder.at(folder / "checkpoints"),
        seed=1,
    )


def perturb(model: Path) -> None:
    """Train every weight by a little: other weights of the same shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    trained: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for weight in trained.parameters():
        weight.data += 1e-3 * torch.randn_like(weight)
    trained.save_pretrained(model)


def test_a_half_done_training_notices_another_base_model_of_the_same_shapes(training_set: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "base")
    half_done = job(TrainingConfig(), model, training_set, tmp_path)
    plan_training(half_done)
    plan_training(half_done)
    before = model_identity(str(model))
    perturb(model)
    assert model_identity(str(model))["config"] == before["config"]
    with pytest.raises(ResumeRefused, match=r"model.weights.model.safetensors: was "):
        plan_training(half_done)


def test_the_same_weights_elsewhere_are_the_same_model(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    assert model_identity(str(tmp_path / "copy")) == model_identity(str(tiny_model))


ALONE = {"num_workers": 1, "batch_size_per_worker": 8}
SAME_STEP = {"batch_size_per_worker": 2, "gradient_accumulation_steps": 2}
LESS = {"gradient_checkpointing": True, "attention": "eager", "save_steps": 3, "deepspeed": "zero2_offload"}


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ({}, SAME_STEP | LESS, None),
        ({"deepspeed": "none"}, {"deepspeed": "none"} | ALONE, None),
        ({}, {"batch_size_per_worker": 2}, "training.rows_per_step: was 8, is 4"),
        ({}, ALONE, None),
        ({"deepspeed": "zero3"}, {"deepspeed": "zero3"} | ALONE, None),
        (
            {"optimizer": "adafactor"},
            {"optimizer": "adafactor"} | ALONE,
            "divides it among num_workers 2, .* among num_workers 1. Go on with the deepspeed and num_workers that it",
        ),
        ({"deepspeed": "zero0"}, {"deepspeed": "zero0"} | ALONE, "zero0 divides it among num_workers 2"),
        ({}, {"deepspeed": "none"}, "as deepspeed zero1 or zero2 divides it, and .* in one piece"),
        ({}, {"deepspeed": "zero3"}, "and this training would read it as deepspeed zero3 divides it"),
        ({"deepspeed": "zero1"}, {"deepspeed": "zero2"}, None),
        ({}, {"learning_rate": 1e-3}, "training.learning_rate"),
    ],
    ids=[
        "time-and-memory",
        "workers",
        "rows-per-step",
        "workers-under-zero",
        "workers-under-zero3",
        "workers-under-zero-with-another-optimizer",
        "workers-under-zero0",
        "zero",
        "zero3",
        "zero1-to-zero2",
        "learning-rate",
    ],
)
def test_what_costs_only_time_or_memory_may_change_on_resume(
    before: dict[str, Any],
    after: dict[str, Any],
    difference: str | None,
    tiny_model: Path,
    training_set: Path,
    tmp_path: Path,
) -> None:
    base = {"num_workers": 2, "batch_size_per_worker": 4, "gradient_accumulation_steps": 1}
    first = TrainingConfig.model_validate(base | before)
    plan, _ = plan_training(job(first, tiny_model, training_set, tmp_path))
    changed = job(TrainingConfig.model_validate(base | before | after), tiny_model, training_set, tmp_path)
    if difference is not None:
        with pytest.raises(ResumeRefused, match=difference):
            plan_training(changed)
        return
    again, _ = plan_training(changed)
    assert again.tasks[0].fingerprint == plan.tasks[0].fingerprint
    assert again.tasks[0].num_steps == plan.tasks[0].num_steps


def test_workers_that_the_cluster_can_never_hold_are_refused_at_once(
    ray_cluster: None, tiny_model: Path, training_set: Path, tmp_path: Path
) -> None:
    many = TrainingConfig(num_workers=64)
    with pytest.raises(ConfigError, match=r"training requests 1 CPU per worker for 64 workers at a time"):
        train_adapters(job(many, tiny_model, training_set, tmp_path / "many"))
    with pytest.raises(ConfigError, match=r"training requests 1 CPU, 1 GPU per worker, and no node has that"):
        train_adapters(job(TrainingConfig(gpus_per_worker=1), tiny_model, training_set, tmp_path / "gpu"))


def test_only_errors_that_a_restart_may_cure_start_the_workers_again() -> None:
    import torch
    from ray.exceptions import ActorDiedError

    from aft_ray.training.failures import StopWhatNoRestartCures

    def ends(*errors: Exception) -> bool:
        try:
            StopWhatNoRestartCures().after_exception(None, dict(enumerate(errors)))
        except Exception as error:
            assert error in errors
            return True
        return False

    lasting = [
        ConfigError("no such module"),
        InputError("a broken row"),
        TrainingFailed("nothing was trained"),
        ValueError("an argument"),
        KeyError("a name"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        OSError(28, "No space left on device"),
    ]
    passing = [
        RuntimeError("NCCL communicator was aborted"),
        torch.distributed.DistBackendError("Connection closed by peer"),
        ConnectionResetError("peer"),
        StorageError("s3://bucket/run: the storage does not answer"),
    ]
    assert [error for error in lasting if not ends(error)] == []
    assert [error for error in passing if ends(error)] == []
    assert not ends(ValueError("follows from the death of the other worker"), ActorDiedError())


def test_no_module_of_training_imports_one_that_imports_it() -> None:
    import ast

    folder = Path(importlib.import_module("aft_ray.training").__file__ or "").parent
    imports = {}
    for file in folder.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        imports[file.stem] = {
            (node.module or "").removeprefix("aft_ray.training").lstrip(".") or "__init__"
            for node in nodes
            if (node.module or "").startswith("aft_ray.training")
        }
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError
