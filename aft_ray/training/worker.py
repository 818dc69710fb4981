"""The code that runs in each Ray Train worker. It takes each task from its last checkpoint to a proved adapter.

    read rows -> build trainer -> check the first batch -> train -> save -> prove -> rename into place

Several tasks share one group of workers, because starting a group, above all its imports, takes longer than a small
training. Ray Train restarts workers that raise. So a failure that a restart cannot cure, such as a nan loss or a failed
proof, is returned instead.
"""

from __future__ import annotations

import gc
import importlib.resources
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.config import TrainingConfig
from aft_ray.errors import AftError
from aft_ray.storage import empty_partial
from aft_ray.training.adapter import finish_folder, finished_summary
from aft_ray.training.examples import check_batch, rows_to_train
from aft_ray.training.metrics import read_metrics
from aft_ray.training.task import TrainingJob, TrainSummary, TrainTask

if TYPE_CHECKING:
    from aft_ray.training.proof import Ending

MODEL_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids")


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """What the driver sends to every worker."""

    job: TrainingJob
    """The job, with absolute paths."""
    tasks: tuple[TrainTask, ...]
    """The adapters that are not complete yet."""
    called_at: float
    """time.time() of the call, from which the start-up seconds are counted."""


def run_worker(loop: dict[Any, Any]) -> dict[str, Any]:
    """Ray Train's train function. Every worker returns {"summaries": {variant: summary}, "error": AftError | None}."""
    plan: WorkerPlan = loop["plan"]
    set_up_process(plan.job.config)
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
    """Import the libraries, limit this process to its share of CPUs, and connect DeepSpeed."""
    gc.disable()  # imports make millions of lasting objects; collecting among them takes a sixth of the time
    import deepspeed.ops
    import torch

    import aft_ray.training.trainer  # noqa: F401  # TRL, transformers, peft

    gc.enable()
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    if config.gpus_per_worker == 0:
        # DeepSpeed would first compile a C++ all-reduce, for half a minute; gloo does the same work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.deepspeed != "none":
        # takes over Ray Train's process group: transformers would connect only after ZeRO-3 has loaded the model
        deepspeed.init_distributed(backend_of(config), auto_mpi_discovery=False, verbose=False)


def train_one(plan: WorkerPlan, task: TrainTask, since: float) -> TrainSummary:
    """Train one adapter. All workers return the same summary or raise the same AftError."""
    from aft_ray.training.trainer import StepLog, WeightSums, last_checkpoint

    sums, steps = WeightSums(), StepLog(task.metrics_file)
    checkpoint = last_checkpoint(task)
    with tempfile.TemporaryDirectory(prefix="aft-ray-") as scratch:
        trainer = build_trainer(plan, task, scratch, [sums, steps])
        check_first_batch(trainer, plan.job.model)
        with tracked(plan.job.config):
            if checkpoint is None:
                trainer.train()
            else:
                with checkpoint.as_directory() as folder:
                    trainer.train(resume_from_checkpoint=folder)
        summary = summarize(task, trainer.args.world_size, since, steps)
        finish(plan, task, trainer, sums, steps.first_step, summary)
    return summary


@contextmanager
def tracked(config: TrainingConfig) -> Iterator[None]:
    """End the wandb run of this variant with its training, and mark it as failed where the training failed.

    wandb's callback leaves that to the end of the process, for which Ray does not wait, and the next variant would
    continue in the same wandb run.
    """
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if "wandb" in config.report_to:
            import wandb

            wandb.finish(exit_code)


def check_first_batch(trainer: Any, model: str) -> None:
    """Check the first batch of each worker. All workers raise the error that one of them finds."""
    import torch.distributed as dist

    own: AftError | None = None
    try:
        check_batch(next(iter(trainer.get_train_dataloader())), model)
    except AftError as error:
        own = error
    found: list[AftError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if errors := [one for one in found if one is not None]:
        raise errors[0]


def build_trainer(plan: WorkerPlan, task: TrainTask, scratch: str, callbacks: list[Any]) -> Any:
    """Build the trainer of a task. Its arguments come first: ZeRO-3 must be set up before the model is loaded."""
    from transformers import AutoTokenizer, PrinterCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from aft_ray.training.held_out import HeldOutLog
    from aft_ray.training.loading import load_base, with_lora
    from aft_ray.training.packing import PackingCheck, fullest_row
    from aft_ray.training.trainer import EpochOrder, RayCheckpoints, TargetTrainer

    config = plan.job.config
    args = sft_arguments(plan, task, scratch)
    tokenizer = AutoTokenizer.from_pretrained(plan.job.model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    padded = DataCollatorForLanguageModeling(pad_token_id=pad_id)
    packed = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)
    model, lora = with_lora(config, load_base(config, plan.job.model))
    held_out = [HeldOutLog(task, config, plan.job.training_set, tokenizer, padded)] if config.eval_steps else []
    trainer = TargetTrainer(
        model=model,
        args=args,
        train_dataset=rows_to_train(plan.job.training_set, task.variant, config.pack_length, task.fingerprint),
        processing_class=tokenizer,
        data_collator=padded if config.pack_length is None else packed,
        peft_config=lora,
        callbacks=[EpochOrder(), RayCheckpoints(task), *held_out, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    for callback in held_out:
        callback.attach(trainer)
    if config.pack_length is not None:
        row = collated(trainer, [fullest_row(trainer.train_dataset)])
        trainer.add_callback(PackingCheck(row, trainer.head))
    return trainer


def sft_arguments(plan: WorkerPlan, task: TrainTask, scratch: str) -> Any:
    """Return the settings as TRL's `SFTConfig`."""
    from trl import SFTConfig

    from aft_ray.training.loading import is_bf16

    config = plan.job.config
    on_cpu = config.gpus_per_worker == 0
    if "tensorboard" in config.report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(task.folder / "tensorboard")
    return SFTConfig(
        output_dir=scratch,
        per_device_train_batch_size=config.batch_size_per_worker,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_epochs,
        warmup_steps=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        bf16=is_bf16(config),
        gradient_checkpointing=config.gradient_checkpointing,
        deepspeed=preset(config.deepspeed),
        use_cpu=on_cpu,
        ddp_backend=backend_of(config),
        seed=plan.job.seed % 2**32,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows already hold ids and labels
        remove_unused_columns=False,  # packed rows carry the lengths of their examples
        max_length=None,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a nan must show instead of becoming an average of earlier steps
        disable_tqdm=True,
        report_to=list(config.report_to) or "none",
        run_name=task.variant,
        log_level="error",
        save_total_limit=1,
        dataloader_pin_memory=not on_cpu,
    )


def preset(name: str) -> dict[str, Any] | None:
    """Read a packaged DeepSpeed configuration. None stands for plain data parallelism."""
    if name == "none":
        return None
    return json.loads(importlib.resources.files("aft_ray.training").joinpath(f"deepspeed/{name}.json").read_text())


def backend_of(config: TrainingConfig) -> str:
    """Return the torch.distributed backend."""
    return "nccl" if config.gpus_per_worker else "gloo"


def summarize(task: TrainTask, world_size: int, since: float, steps: Any) -> TrainSummary:
    """Return the numbers of a finished training, from its metrics file, which covers all attempts."""
    rows, held_out = read_metrics(task.metrics_file), read_metrics(task.held_out_file)
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
        held_out_perplexity=held_out[-1]["perplexity"] if held_out else None,
    )


def finish(plan: WorkerPlan, task: TrainTask, trainer: Any, sums: Any, first_step: int, summary: TrainSummary) -> None:
    """Save the adapter or model, prove it and rename its folder. All workers end with the same verdict."""
    import torch.distributed as dist
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from aft_ray.training.proof import Ending, batch_loss

    first = trainer.is_world_process_zero()
    batch = collated(trainer, shortest_rows(trainer))
    ending = Ending(
        num_steps=trainer.state.global_step,
        changed_frozen=sums.changed_frozen(trainer.model),
        is_unchanged=plan.job.config.method == "full"  # a LoRA is checked tensor by tensor (check_adapter)
        and first_step < task.num_steps
        and sums.is_unchanged(trainer.model),
        batch=batch,
        loss=batch_loss(trainer.model, batch, trainer.head),
    )
    folder = empty_partial(task.output) if first else Path(trainer.args.output_dir)
    dist.barrier()
    trainer.save_model(str(folder))
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    unset_hf_deepspeed_config()  # so that ZeRO-3 does not split the model that is loaded for the proof
    verdict: list[AftError | None] = [None]
    if first:
        verdict = [_verdict(plan, task, folder, ending, summary)]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise verdict[0]


def shortest_rows(trainer: Any) -> list[dict[str, Any]]:
    """Return the two shortest rows: enough to compare two losses on, and the same on every worker."""
    rows: Any = trainer.train_dataset
    lengths = [len(ids) for ids in rows["input_ids"]]
    return [rows[place] for place in sorted(range(len(lengths)), key=lengths.__getitem__)[:2]]


def collated(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate rows into a batch of the trainer, on its device."""
    batch = trainer.data_collator(rows)
    return {name: batch[name].to(trainer.args.device) for name in MODEL_INPUTS if name in batch}


def _verdict(plan: WorkerPlan, task: TrainTask, folder: Path, ending: Ending, summary: TrainSummary) -> AftError | None:
    from aft_ray.training import proof

    try:
        proof.check_ending(task, ending, read_metrics(task.metrics_file))
        if plan.job.config.method == "lora":
            proof.check_adapter(
                task, folder, Path(plan.job.config.init_adapter) if plan.job.config.init_adapter else None
            )
        proof.check_reload(task, plan.job.config, plan.job.model, folder, ending)
        finish_folder(task, plan.job.model, summary)
    except AftError as error:
        return error
    return None
