"""Every training mode gives the losses of a plain PyTorch loop: ZeRO stages, packing, full fine-tuning, two rounds.

All of them are real trainings by two Ray Train workers with DeepSpeed. Those of a tier share one group of workers,
because starting one takes longer than a training of this size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional

from aft_ray.config import LoraSettings, TrainingConfig
from aft_ray.errors import TrainingFailed
from aft_ray.storage import Folder
from aft_ray.training import TrainingJob, TrainSummary
from aft_ray.training.examples import batch_order
from aft_ray.training.failures import reason
from aft_ray.training.metrics import HELD_OUT, METRICS
from aft_ray.training.packing import check_packing, fullest_row
from aft_ray.training.proof import batch_loss
from aft_ray.training.rows import open_rows, write_rows
from aft_ray.training.run import TRACKERS, _worker_environment, plan_training
from aft_ray.training.target_head import TargetHead
from aft_ray.training.worker import WorkerPlan, run_worker
from tests.kills import kill_a_train_worker, when

SEED = 7
NUM_EPOCHS = 4
PACK_LENGTH = 128
INSTALLED = tuple(t for t, packages in TRACKERS.items() if any(map(importlib.util.find_spec, packages)))
BASE = TrainingConfig(
    num_workers=2,
    batch_size_per_worker=4,
    num_epochs=NUM_EPOCHS,
    learning_rate=5e-3,
    bf16=False,
    lora=LoraSettings(rank=4),
)
STOPPING = {
    "learning_rate": 2e-2,
    "max_steps": 30,
    "eval_steps": 2,
    "early_stopping_patience": 2,
    "num_eval_answers": 1,
    "load_best_model_at_end": True,
}
"""More steps than NUM_EPOCHS has. What is trained makes held-out answers, which are others, ever less likely."""
MODES: dict[str, dict[str, Any]] = {
    "plain": {"deepspeed": "none"},
    "zero0": {"deepspeed": "zero0"},
    "zero1": {"deepspeed": "zero1"},
    "zero2-accumulated": {"deepspeed": "zero2", "batch_size_per_worker": 2, "gradient_accumulation_steps": 2},
    "zero3": {"deepspeed": "zero3", "eval_steps": 5, "num_eval_answers": 1},
    "packed": {"pack_length": PACK_LENGTH, "batch_size_per_worker": 1, "eval_steps": 5},
    "checkpointed": {"gradient_checkpointing": True},
    "full": {"method": "full", "deepspeed": "none", "learning_rate": 2e-3},
    "full-zero3": {"method": "full", "deepspeed": "zero3", "learning_rate": 2e-3},
    "cosine": {"lr_scheduler": "cosine", "weight_decay": 0.3, "deepspeed": "zero2"},
    "rslora": {"lora": LoraSettings(rank=4, rslora=True)},
    "dora-zero3": {"lora": LoraSettings(rank=4, dora=True), "deepspeed": "zero3"},
    "second-round": {"init_adapter": "first-round"},
    "second-round-zero3-bf16": {"init_adapter": "first-round", "deepspeed": "zero3", "bf16": True},
    "zero2-offload": {"deepspeed": "zero2_offload"},
    "zero3-offload": {"deepspeed": "zero3_offload"},
    "tracked": {"report_to": INSTALLED},
    "zero3-killed": {"deepspeed": "zero3", "save_steps": 2},
    "changed-killed": {"deepspeed": "zero1", "save_steps": 2, "eval_steps": 1, "load_best_model_at_end": True},
    "saved-modules": {"lora": LoraSettings(rank=4, modules_to_save=("embed_tokens", "lm_head")), "deepspeed": "zero2"},
    "stopped": {"deepspeed": "zero2", **STOPPING},
    "stopped-zero3": {"deepspeed": "zero3", **STOPPING},
    "stopped-full": {"method": "full", "deepspeed": "none", **STOPPING, "learning_rate": 4e-3},
    "fused-head": {"deepspeed": "none"},
    "fused-head-packed": {"pack_length": PACK_LENGTH, "batch_size_per_worker": 1},
}
FAST = ("plain", "zero2-accumulated", "packed", "full", "fused-head", "stopped")
SOAK = tuple(name for name in MODES if name not in FAST)
DIVERGING = {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0}
UNPROVABLE: dict[str, Any] = {"deepspeed": "zero2"}
AFTER_THE_KILL = {"attention": "eager", "deepspeed": "zero2_offload", "save_steps": 3}
"""What else is changed while `changed-killed` is resumed, beside what the message after a lack of memory advises."""


@dataclasses.dataclass(frozen=True)
class Mode:
    """One finished training."""

    config: TrainingConfig
    summary: TrainSummary
    folder: Folder
    """Its folder in the checkpoints."""


@pytest.fixture(scope="module")
def modes(
    ray_cluster: None, tiny_model: Path, training_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Mode]:
    """Give the mode of a name; whichever is asked for first, all modes of its tier are trained."""

    @functools.cache
    def train_tier(names: tuple[str, ...]) -> dict[str, Mode]:
        return train_modes(names, tiny_model, training_set, tmp_path_factory.mktemp("modes"))

    return lambda name: train_tier(FAST if name in FAST else SOAK)[name]


def train_modes(names: tuple[str, ...], tiny_model: Path, training_set: Path, folder: Path) -> dict[str, Mode]:
    """Train every mode in one group of workers, and one that diverges and one without proof.

    A worker is killed in each mode whose name says so.
    """
    from peft import LoraConfig, get_peft_model
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from transformers import AutoModelForCausalLM

    first_round = str(folder / "first-round")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(first_round)
    plans: dict[str, WorkerPlan] = {}
    others = {"diverging": DIVERGING, "unprovable": UNPROVABLE}
    for name, changes in ({name: MODES[name] for name in names} | others).items():
        starts = {"init_adapter": first_round} if "init_adapter" in changes else {}
        job = TrainingJob(
            config=TrainingConfig.model_validate({**BASE.model_dump(), **changes, **starts}),
            model=str(tiny_model),
            training_set=Folder.at(training_set),
            outputs={"aft": Folder.at(folder / name / "model")},
            checkpoints=Folder.at(folder / name / "checkpoints"),
            seed=SEED,
            template_hashes={"aggregator": name},  # so that no mode goes on from the checkpoint of another
        )
        plans[name], _ = plan_training(job)

    trackers = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"file://{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }

    resumed = {name: advised(plan) for name, plan in plans.items() if name == "changed-killed"}

    def train_all(loop: dict[str, Any]) -> dict[str, dict[str, Any]]:
        import gc

        from transformers import PreTrainedModel

        from aft_ray.training import proof
        from aft_ray.training.trainer import TargetTrainer, last_checkpoint

        load_trained, results = proof.load_trained, {}
        for name, plan in loop["plans"].items():
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # a mode before this one may have left it
            if name in loop["resumed"] and last_checkpoint(plan.tasks[0]) is not None:
                plan = loop["resumed"][name]
            resident: list[int] = []

            def load(*arguments: Any, resident: Any = resident, name: str = name) -> Any:
                for model in [one for one in gc.get_objects() if issubclass(type(one), PreTrainedModel)]:
                    for weight in model.parameters():
                        resident.append(weight.numel() + getattr(weight, "ds_tensor", weight).numel())
                if name == "unprovable":
                    raise RuntimeError("the GPU is gone")
                return load_trained(*arguments)

            fused = mock.patch.object(TargetTrainer, "has_fused_head", name.startswith("fused-head"))
            with mock.patch.object(proof, "load_trained", load), fused:
                results[name] = run_worker({"plan": plan}) | {"resident": resident}
        return results

    to_kill = [name for name in names if name.endswith("-killed")]
    trainer = TorchTrainer(
        train_all,  # type: ignore[arg-type]
        train_loop_config={"plans": plans, "resumed": resumed},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            storage_path=str(folder),
            name="all",
            failure_config=FailureConfig(max_failures=len(to_kill)),
            worker_runtime_env={"env_vars": _worker_environment(BASE) | trackers},
        ),
    )
    with killed_in_each(folder / "all", [plans[name].tasks[0].fingerprint for name in to_kill]):
        results: Any = trainer.fit().return_value
    unprovable = results.pop("unprovable")["error"]
    kept = folder / "unprovable" / "model.partial"
    assert isinstance(unprovable, TrainingFailed)
    message = f"variant aft: the proof ended with RuntimeError: the GPU is gone. What was trained is kept: {kept}"
    assert str(unprovable) == message
    assert (kept / "adapter_model.safetensors").is_file()
    assert not (folder / "unprovable" / "model").exists()
    diverged = results.pop("diverging")["error"]
    assert isinstance(diverged, TrainingFailed)
    assert re.match(r"variant aft: the loss is (nan|inf) at step \d+; lower training.learning_rate", str(diverged))
    assert not (folder / "diverging" / "model").exists()
    for name, result in results.items():
        assert result["error"] is None, f"{name}: {result['error']}"
        assert sum(result["resident"]) == 0, f"{name}: the trained model is in memory when the saved one is loaded"
    return {
        name: Mode(plans[name].job.config, results[name]["summaries"]["aft"], plans[name].tasks[0].folder)
        for name in names
    }


def advised(plan: WorkerPlan) -> WorkerPlan:
    """Return the plan with the options that the message after a lack of memory tells to run with, and others."""
    message = reason(RuntimeError("CUDA out of memory"), plan.job.config)
    options = {name: yaml.safe_load(value) for name, value in re.findall(r"--set training\.(\w+)=(\S+)", message)}
    assert options == {"batch_size_per_worker": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    config = TrainingConfig.model_validate({**plan.job.config.model_dump(), **options, **AFTER_THE_KILL})
    changed, _ = plan_training(dataclasses.replace(plan.job, config=config))  # raises where the folder is refused
    return changed


@contextlib.contextmanager
def killed_in_each(folder: Path, fingerprints: list[str]) -> Iterator[None]:
    """Kill a worker in each of these tasks, one after the other, once it has a checkpoint."""
    kept = folder / "checkpoint_manager_snapshot.json"

    def kill_in_each() -> None:
        for fingerprint in fingerprints:
            when(lambda found=fingerprint: kept.exists() and found in kept.read_text(), kill_a_train_worker)

    killer = threading.Thread(target=kill_in_each)
    killer.start()
    yield
    killer.join(timeout=5)
    assert not killer.is_alive()


def rows_of(training_set: Path, pack_length: int | None) -> Any:
    file = training_set / f"{pack_length}.arrow"
    write_rows(Folder.at(training_set), "aft", pack_length, file)
    return open_rows(file)


def batches_of(config: TrainingConfig, training_set: Path) -> list[list[dict[str, Any]]]:
    """Return the examples of every optimizer step; packed rows are split again."""
    rows: Any = rows_of(training_set, config.pack_length)
    size = config.batch_size_per_worker * config.num_workers * config.gradient_accumulation_steps
    num_epochs = NUM_EPOCHS if config.max_steps is None else math.ceil(config.max_steps * size / len(rows))
    order = [
        index
        for epoch in range(num_epochs)
        for index in batch_order([len(ids) for ids in rows["input_ids"]], size, SEED, epoch)
    ]
    return [
        [example for index in order[start : start + size] for example in unpacked(rows[index])]
        for start in range(0, len(order), size)
    ][: config.max_steps]


def unpacked(row: dict[str, Any]) -> list[dict[str, Any]]:
    lengths = row.get("seq_lengths") or [len(row["input_ids"])]
    ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return [
        {name: row[name][end - length : end] for name in ("input_ids", "labels")}
        for length, end in zip(lengths, ends, strict=True)
    ]


def plain_curve(config: TrainingConfig, model: Path, batches: list[list[dict[str, Any]]]) -> list[float]:
    """Return the losses of one process: whole head, padded batches, mean over target tokens, AdamW, clipping, decay."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler, set_seed
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    set_seed(SEED)
    trained: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if config.init_adapter:
        trained = PeftModel.from_pretrained(trained, config.init_adapter, is_trainable=True)
    elif config.method == "lora":
        settings = config.lora
        lora = LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules="all-linear",
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            modules_to_save=list(settings.modules_to_save) or None,
        )
        trained = get_peft_model(trained, lora)
    weights = [weight for weight in trained.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    num_warmup = math.ceil(len(batches) * config.warmup_ratio)
    schedule = get_scheduler(config.lr_scheduler, optimizer, num_warmup, len(batches))
    curve = []
    for rows in batches:
        batch = DataCollatorForLanguageModeling(pad_token_id=2)(rows)
        logits = trained(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAK)])
def test_the_losses_are_those_of_a_plain_loop(
    name: str, modes: Callable[[str], Mode], tiny_model: Path, training_set: Path
) -> None:
    mode = modes(name)
    batches = batches_of(mode.config, training_set)
    expected = plain_curve(mode.config, tiny_model, batches)
    found = [row["loss"] for row in mode.folder.json_lines(METRICS)]
    assert mode.summary.num_steps == len(found)
    assert mode.summary.stopped_early == (len(found) < len(batches)) == name.startswith("stopped")
    assert found == pytest.approx(expected[: len(found)], rel=5e-2 if mode.config.bf16 else 2e-3, abs=2e-4)
    assert found[-1] < 0.9 * found[0]


@pytest.mark.soak
def test_a_worker_killed_under_zero3_changes_nothing(modes: Callable[[str], Mode]) -> None:
    """Its losses are tested above. Here its adapter must equal that of a training without interruption."""
    whole, killed = modes("zero3").summary, modes("zero3-killed").summary
    assert whole.resumed_from_step == 0
    assert 0 < killed.resumed_from_step < killed.num_steps
    assert killed.resumed_from_step % 2 == 0
    adapters = [load_file(Path(one.adapter_path) / "adapter_model.safetensors") for one in (whole, killed)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).abs().max() < 1e-5, name


@pytest.mark.soak
def test_a_training_goes_on_with_what_the_message_after_a_lack_of_memory_says(modes: Callable[[str], Mode]) -> None:
    """Its losses are tested above: those of the micro batches, attention and ZeRO preset that it began with."""
    summary = modes("changed-killed").summary
    assert 0 < summary.resumed_from_step < summary.num_steps


@pytest.mark.soak
@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_is_told_of_every_step(tracker: str, modes: Callable[[str], Mode]) -> None:
    if tracker not in INSTALLED:
        pytest.skip(f"{tracker} is not installed")
    num_steps, folder = modes("tracked").summary.num_steps, Path(modes("tracked").folder.path)
    if tracker == "tensorboard":
        [file] = (folder / "tensorboard").rglob("events.out.*")
        assert file.read_bytes().count(b"train/loss") == num_steps
    elif tracker == "wandb":
        [file] = (folder.parents[2] / "wandb").glob("offline-run-*/*.wandb")
        assert file.read_bytes().count(b"train/loss") >= num_steps
    else:
        [file] = (folder.parents[2] / "mlruns").rglob("metrics/loss")
        assert len(file.read_text().splitlines()) == num_steps


def test_packing_makes_fewer_rows_of_the_same_tokens(modes: Callable[[str], Mode], training_set: Path) -> None:
    packed, plain = modes("packed").summary, modes("plain").summary
    rows: Any = rows_of(training_set, PACK_LENGTH)
    assert len(rows) < plain.num_rows / 1.5
    assert max(map(len, rows["input_ids"])) <= PACK_LENGTH
    assert packed.num_tokens == pytest.approx(plain.num_tokens, rel=0.1)  # the last batch is filled up
    assert packed.num_rows == plain.num_rows


@pytest.mark.parametrize("name", [pytest.param("zero3", marks=pytest.mark.soak), "packed"])
def test_held_out_losses_and_answers_are_logged_at_the_set_steps(
    name: str, modes: Callable[[str], Mode], tiny_model: Path, examples: list[dict[str, Any]]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    mode = modes(name)
    rows = mode.folder.json_lines(HELD_OUT)
    steps = mode.summary.num_steps
    assert [row["step"] for row in rows] == [*range(5, steps, 5), steps]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, mode.summary.adapter_path)
    for variant in ("sft", "aft"):
        held_out = [row for row in examples if row["variant"] == variant and row["split"] == "held_out"]
        losses, count = 0.0, 0
        for row in held_out:
            logits = adapted(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            losses += functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
        assert rows[-1]["loss"][variant] == pytest.approx(losses / count, rel=1e-3)
        assert rows[-1]["perplexity"][variant] == pytest.approx(math.exp(losses / count), rel=1e-2)
    assert [answer["target"] for answer in rows[-1]["answers"]] == ["aaaa"] * mode.config.num_eval_answers
    assert mode.summary.held_out_perplexity == rows[-1]["perplexity"]


@pytest.mark.parametrize(
    "name",
    [
        "stopped",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("stopped-zero3", "stopped-full", "changed-killed")),
    ],
)
def test_the_state_with_the_lowest_held_out_loss_is_exported(
    name: str, modes: Callable[[str], Mode], tiny_model: Path, examples: list[dict[str, Any]]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    mode = modes(name)
    summary, folder = mode.summary, Path(mode.summary.adapter_path)
    rows = mode.folder.json_lines(HELD_OUT)
    losses = [row["loss"]["aft"] for row in rows]
    best = rows[losses.index(min(losses))]
    assert summary.exported_step == best["step"]
    assert summary.held_out_perplexity == best["perplexity"]
    if summary.stopped_early:
        assert f"step {best['step']}, which had the lowest loss" in (folder / "model_card.md").read_text()
        assert len(losses) - losses.index(min(losses)) == 3, "two evaluations without a lower loss"
        assert rows[-1]["step"] == summary.num_steps
        assert ["stops" in row for row in rows] == [False] * (len(rows) - 1) + [True]
    base = AutoModelForCausalLM.from_pretrained(
        folder if mode.config.method == "full" else tiny_model, dtype=torch.float32
    )
    model = base if mode.config.method == "full" else PeftModel.from_pretrained(base, folder)
    held_out = [row for row in examples if row["variant"] == "aft" and row["split"] == "held_out"]
    batch = DataCollatorForLanguageModeling(pad_token_id=2)(held_out)
    assert batch_loss(model, batch) == pytest.approx(min(losses), rel=1e-3)
    assert mode.folder.names("best.json") and not mode.folder.folder_names()


@pytest.mark.parametrize("name", ["full", pytest.param("full-zero3", marks=pytest.mark.soak)])
def test_a_fully_trained_model_is_a_whole_model(name: str, modes: Callable[[str], Mode]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(modes(name).summary.adapter_path)
    assert not (folder / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert json.loads((folder / "summary.json").read_text())["settings"]["training"]["method"] == "full"
    assert "model" in (folder / "model_card.md").read_text()


def test_attention_that_ignores_positions_is_found_before_the_first_step(tiny_model: Path, training_set: Path) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows: Any = rows_of(training_set, PACK_LENGTH)
    row = DataCollatorForLanguageModeling(pad_token_id=2, padding_free=True)([fullest_row(rows)])
    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=attention)
        head = TargetHead(model)
        check_packing(model, head, row)

    def blind(**inputs: Any) -> Any:
        return model(**{name: value for name, value in inputs.items() if name != "position_ids"})

    blind.eval = model.eval  # type: ignore[attr-defined]
    blind.train = model.train  # type: ignore[attr-defined]
    blind.training = False  # type: ignore[attr-defined]
    blind.parameters = model.parameters  # type: ignore[attr-defined]
    with pytest.raises(TrainingFailed, match="lets them see each other"):
        check_packing(blind, head, row)
