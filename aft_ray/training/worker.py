"""What runs in each Ray Train worker: the tasks in turn, each from its last checkpoint to a proved adapter.

    read rows -> build trainer -> check the first batch -> train -> save -> prove -> rename into place

Several tasks share one group of workers, because starting one (imports above all) takes longer than a small training.
A failure that a restart cannot cure (a nan loss, a proof that does not hold) is returned, not raised: Ray Train
restarts workers that raise.
"""

from __future__ import annotations

import gc
import importlib.resources
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aft_ray.config import TrainingConfig
from aft_ray.errors import AftError
from aft_ray.training.adapter import clear_partial, finish_folder, finished_summary
from aft_ray.training.examples import check_batch, read_examples
from aft_ray.training.metrics import read_metrics
from aft_ray.training.task import TrainSummary, TrainTask


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """What the driver sends to every worker."""

    config: TrainingConfig
    model: str
    training_set: Path
    seed: int
    tasks: tuple[TrainTask, ...]
    called_at: float
    """time.time() of the call, for the start-up seconds."""


def run_worker(loop: dict[Any, Any]) -> dict[str, Any]:
    """Ray Train's train function: {"summaries": {variant: TrainSummary}, "error": AftError | None} on every worker."""
    plan: WorkerPlan = loop["plan"]
    set_up_process(plan.config)
    summaries: dict[str, TrainSummary] = {}
    since = plan.called_at
    for task in plan.tasks:
        try:
            summaries[task.variant] = finished_summary(task) or train_one(plan, task, since)
        except AftError as error:
            return {"summaries": summaries, "error": error}
        since = time.time()
    return {"summaries": summaries, "error": None}


def set_up_process(config: TrainingConfig) -> None:
    """Import the libraries, and keep this process to its CPU share."""
    gc.disable()  # imports make millions of objects that stay; walking them again and again is a sixth of the time
    import deepspeed.ops
    import torch

    import aft_ray.training.trainer  # noqa: F401  # TRL, transformers, peft

    gc.enable()
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    if config.gpus_per_worker == 0:
        # DeepSpeed would first compile a C++ all-reduce, half a minute of a compiler; gloo does the same work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.deepspeed != "none":
        # takes over Ray Train's process group; left to transformers, ZeRO-3 loads the model before it knows the others
        deepspeed.init_distributed(backend_of(config), auto_mpi_discovery=False, verbose=False)


def train_one(plan: WorkerPlan, task: TrainTask, since: float) -> TrainSummary:
    """Train one adapter. Every worker raises the same AftError, or returns the same summary."""
    from aft_ray.training.trainer import FrozenSums, StepLog, last_checkpoint

    frozen, steps = FrozenSums(), StepLog(task.metrics_file)
    checkpoint = last_checkpoint(task)
    with tempfile.TemporaryDirectory(prefix="aft-ray-") as scratch:
        trainer = build_trainer(plan, task, scratch, [frozen, steps])
        check_batch(next(iter(trainer.get_train_dataloader())))
        if checkpoint is None:
            trainer.train()
        else:
            with checkpoint.as_directory() as folder:
                trainer.train(resume_from_checkpoint=folder)
        summary = summarize(task, trainer.args.world_size, since, steps)
        finish(plan, task, trainer, frozen, summary)
    return summary


def build_trainer(plan: WorkerPlan, task: TrainTask, scratch: str, callbacks: list[Any]) -> Any:
    """The trainer on this task's rows. The arguments come first: ZeRO-3 must know of the model before it is loaded."""
    from transformers import AutoTokenizer, PrinterCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from aft_ray.training.trainer import EpochOrder, RayCheckpoints, TargetTrainer

    args = sft_arguments(plan.config, scratch, plan.seed)
    tokenizer = AutoTokenizer.from_pretrained(plan.model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    model, lora = base_and_lora(plan.config, plan.model)
    trainer = TargetTrainer(
        model=model,
        args=args,
        train_dataset=dataset_of(plan.training_set, task),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=pad or 0),
        peft_config=lora,
        callbacks=[EpochOrder(), RayCheckpoints(task), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def sft_arguments(config: TrainingConfig, scratch: str, seed: int) -> Any:
    """The settings as TRL's `SFTConfig`."""
    from trl import SFTConfig

    on_cpu = config.gpus_per_worker == 0
    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=config.batch_size_per_worker,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_epochs,
        warmup_steps=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        deepspeed=preset(config.deepspeed),
        use_cpu=on_cpu,
        ddp_backend=backend_of(config),
        seed=seed % 2**32,
        model_init_kwargs=None if config.init_adapter else {"dtype": dtype_name(config)},
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows hold ids and labels already
        max_length=None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a nan must show, not become the average of the steps before it
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        save_total_limit=1,
        dataloader_pin_memory=not on_cpu,
    )


def preset(name: str) -> dict[str, Any] | None:
    """A packaged DeepSpeed configuration, or None for plain data parallelism."""
    if name == "none":
        return None
    return json.loads(importlib.resources.files("aft_ray.training").joinpath(f"deepspeed/{name}.json").read_text())


def backend_of(config: TrainingConfig) -> str:
    """The torch.distributed backend."""
    return "nccl" if config.gpus_per_worker else "gloo"


def dtype_name(config: TrainingConfig) -> str:
    """The dtype the frozen weights are loaded in."""
    return "bfloat16" if config.bf16 else "float32"


def base_and_lora(config: TrainingConfig, model: str) -> tuple[Any, Any]:
    """The model's name and a fresh LoRA; or the model with the adapter to start from, and no fresh one."""
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    if config.init_adapter:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype_name(config))
        return PeftModel.from_pretrained(base, config.init_adapter, is_trainable=True), None
    lora, targets = config.lora, config.lora.target_modules
    return model, LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def dataset_of(training_set: Path, task: TrainTask) -> Any:
    """The variant's rows as the `datasets.Dataset` that TRL wants, with nothing but ids and labels."""
    from datasets import Dataset, table

    rows = read_examples(training_set, task.variant).select(["input_ids", "labels"])
    return Dataset(table.InMemoryTable(rows), fingerprint=task.fingerprint[:16])


def summarize(task: TrainTask, world_size: int, since: float, steps: Any) -> TrainSummary:
    """The numbers of a finished training, from its metrics file, which covers every attempt."""
    rows = read_metrics(task.metrics_file)
    seconds = sum(row["seconds"] for row in rows)
    num_tokens = sum(row["tokens"] for row in rows)
    return TrainSummary(
        variant=task.variant,
        num_rows=task.num_rows,
        num_steps=len(rows),
        num_tokens=num_tokens,
        num_trained_tokens=sum(row["trained_tokens"] for row in rows),
        first_loss=rows[0]["loss"] if rows else float("nan"),
        last_loss=rows[-1]["loss"] if rows else float("nan"),
        seconds=round(seconds, 3),
        startup_seconds=round(steps.began_at - since, 3),
        tokens_per_second=round(num_tokens / max(seconds, 1e-9), 2),
        adapter_path=str(task.output),
        world_size=world_size,
        resumed_from_step=steps.first_step,
    )


def finish(plan: WorkerPlan, task: TrainTask, trainer: Any, frozen: Any, summary: TrainSummary) -> None:
    """Save the adapter, prove it, and give the folder its name. All workers end with the same verdict."""
    import torch.distributed as dist
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from aft_ray.training.proof import batch_loss

    first = trainer.is_world_process_zero()
    moved, steps_taken = frozen.moved(trainer.model), trainer.state.global_step
    batch = smallest_batch(trainer)
    expected = batch_loss(trainer.model, batch, trainer._head)
    folder = clear_partial(task) if first else Path(trainer.args.output_dir)
    dist.barrier()
    trainer.save_model(str(folder))
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    unset_hf_deepspeed_config()  # so that ZeRO-3 does not split the model that is loaded for the proof
    verdict: list[AftError | None] = [None]
    if first:
        verdict = [_verdict(plan, task, folder, moved, steps_taken, batch, expected, summary)]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise verdict[0]


def smallest_batch(trainer: Any) -> dict[str, Any]:
    """The two shortest examples, on the trainer's device: enough to compare two losses on."""
    rows = sorted(trainer.train_dataset, key=lambda row: len(row["input_ids"]))[:2]
    return {name: tensor.to(trainer.args.device) for name, tensor in trainer.data_collator(rows).items()}


def _verdict(
    plan: WorkerPlan,
    task: TrainTask,
    folder: Path,
    moved: list[str],
    steps_taken: int,
    batch: dict[str, Any],
    expected: float,
    summary: TrainSummary,
) -> AftError | None:
    from aft_ray.training import proof

    try:
        proof.check_steps(task, steps_taken, read_metrics(task.metrics_file))
        proof.check_frozen(task, moved)
        proof.check_adapter(task, folder, Path(plan.config.init_adapter) if plan.config.init_adapter else None)
        proof.check_reload(task, plan.model, folder, batch, expected)
        finish_folder(task, plan.model, summary)
    except AftError as error:
        return error
    return None
