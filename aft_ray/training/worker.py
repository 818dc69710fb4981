"""The code that runs in each Ray Train worker. It takes each task from its last checkpoint to a proved adapter.

    resolve the model -> map the rows -> build trainer -> check the first batch -> train -> save
    -> forget the trained model -> load what was saved and prove it -> make it the output

Several tasks share one group of workers, because starting a group, above all its imports, takes longer than a small
training. Ray Train restarts workers that raise, unless failures.py knows that a restart cannot help. A failure that all
workers find together, such as a failed proof, is returned instead, because the workers are well.
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
from aft_ray.errors import AftError, ConfigError, TrainingFailed
from aft_ray.models import resolve_adapter, resolve_model
from aft_ray.runs import difference
from aft_ray.training.adapter import finish_folder, finished_summary, keep_unproved, partial_output
from aft_ray.training.best import fetch_best, forget_best, kept_best
from aft_ray.training.examples import check_batch
from aft_ray.training.identity import adapter_identity, base_name, model_identity
from aft_ray.training.metrics import HELD_OUT, METRICS, has_stopped_early
from aft_ray.training.resharding import forget_converted, is_universal, readable
from aft_ray.training.rows import node_file, rows_on_this_node, shortest
from aft_ray.training.task import TrainingJob, TrainSummary, TrainTask

if TYPE_CHECKING:
    from aft_ray.training.proof import Ending

NUM_PROOF_ROWS = 2
"""Number of rows on which two losses are compared: the shortest, which are the same on every worker."""
MODEL_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids")


class Agreed(Exception):
    """A failure that all workers found together."""

    def __init__(self, error: AftError) -> None:
        super().__init__(error)
        self.error = error


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
    model = model_on_this_node(plan)
    summaries: dict[str, TrainSummary] = {}
    since = plan.called_at
    for task in plan.tasks:
        try:
            summaries[task.variant] = finished_summary(task) or train_one(plan, task, model, since)
        except Agreed as agreed:
            return {"summaries": summaries, "error": agreed.error}
        since = time.time()
    return {"summaries": summaries, "error": None}


def model_on_this_node(plan: WorkerPlan) -> str:
    """Return the folder to load here. Raises ConfigError where it is another model or adapter than the driver's.

    Of a model of the hub, every worker loads the commit that the driver found, tokenizer and weights alike.
    """
    expected = plan.tasks[0].settings["model"]
    name, revision = base_name(expected, plan.job.model)
    model = resolve_model(f"{name}#{revision}" if revision else plan.job.model)
    start = adapter_identity(plan.job.config.init_adapter)
    if start != plan.tasks[0].settings["training"]["init_adapter"]:
        raise ConfigError(
            f"training.init_adapter {plan.job.config.init_adapter}: this worker's node finds other weights there than "
            "the driver. Give both the same files"
        )
    found = model_identity(model)
    if found != expected:
        raise ConfigError(
            f"model {plan.job.model}: the model on this worker's node differs from the driver's:\n"
            f"{difference(expected, found)}\nGive both the same files"
        )
    return model


def set_up_process(config: TrainingConfig) -> None:
    """Import the libraries, limit this process to its share of CPUs, and connect DeepSpeed."""
    gc.disable()  # imports make millions of lasting objects; collecting among them takes a sixth of the time
    import deepspeed.ops
    import torch

    import aft_ray.training.trainer  # noqa: F401  # TRL, transformers, peft

    gc.enable()
    torch.set_num_threads(max(1, int(config.cpus_per_worker)))
    if not config.gpus_per_worker:
        # DeepSpeed would first compile a C++ all-reduce, for half a minute; gloo does the same work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.deepspeed != "none":
        # takes over Ray Train's process group: transformers would connect only after ZeRO-3 has loaded the model
        deepspeed.init_distributed(backend_of(config), auto_mpi_discovery=False, verbose=False)


def train_one(plan: WorkerPlan, task: TrainTask, model: str, since: float) -> TrainSummary:
    """Train one adapter. All workers return the same summary or raise the same Agreed."""
    with tempfile.TemporaryDirectory(prefix="aft-ray-") as scratch:
        summary, folder, ending = train_and_save(plan, task, model, since, Path(scratch))
        forget_the_trained_model()
        agree_on_proof(plan, task, model, folder, ending, summary)
    node_file(task.shard_hashes, task.variant, plan.job.config.pack_length).unlink(missing_ok=True)
    forget_converted(task)
    return summary


def train_and_save(
    plan: WorkerPlan, task: TrainTask, model: str, since: float, scratch: Path
) -> tuple[TrainSummary, Path, Ending]:
    """Train from the last checkpoint and save; return the numbers, the local folder of the result, and how it ended.

    Trainer and model live in this function only, so that the model of the proof finds their memory free.
    """
    from aft_ray.training.trainer import StepLog, WeightSums, last_checkpoint

    sums, steps = WeightSums(), StepLog(task)
    with readable(last_checkpoint(task), task, plan.job.config.num_workers) as checkpoint:
        trainer = build_trainer(plan, task, model, scratch, [sums, steps], universal=is_universal(checkpoint))
        check_first_batch(trainer, model, plan.job.chat_template)
        with tracked(plan.job.config):
            trainer.train(resume_from_checkpoint=checkpoint)
    summary = summarize(task, trainer.args.world_size, since, steps)
    folder, ending = save(plan, task, trainer, sums, steps.first_step, scratch)
    trainer.accelerator.free_memory()
    release_weights(trainer.model)
    return summary, folder, ending


def release_weights(model: Any) -> None:
    """Free the weights of a model, whoever still refers to it: DeepSpeed does under ZeRO-3, for as long as it runs."""
    for weight in model.parameters():
        weight.data = weight.data.new_empty(0)
        if getattr(weight, "ds_tensor", None) is not None:  # this worker's part of it
            weight.ds_tensor.data = weight.ds_tensor.data.new_empty(0)


def forget_the_trained_model() -> None:
    """Free what the libraries still hold of the trained model and its optimizer."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # so that ZeRO-3 does not split the model that is loaded for the proof
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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


def check_first_batch(trainer: Any, model: str, chat_template: str | None) -> None:
    """Check the first batch of each worker. All workers raise, as Agreed, the error that one of them finds."""
    import ray.train.collective
    import torch.distributed as dist

    own: AftError | None = None
    try:
        check_batch(next(iter(trainer.get_train_dataloader())), model, chat_template)
    except AftError as error:
        own = error
    ray.train.collective.barrier()  # without a time limit: a node may take long to download the model
    found: list[AftError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if errors := [one for one in found if one is not None]:
        raise Agreed(errors[0])


def build_trainer(
    plan: WorkerPlan, task: TrainTask, model: str, scratch: Path, callbacks: list[Any], *, universal: bool
) -> Any:
    """Build the trainer of a task. Its arguments come first: ZeRO-3 must be set up before the model is loaded.

    `universal`: whether it will continue from a checkpoint in DeepSpeed's universal form.
    """
    from transformers import AutoTokenizer, PrinterCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from aft_ray.training.held_out import HeldOutLog
    from aft_ray.training.loading import load_base, with_lora
    from aft_ray.training.packing import PackingCheck, fullest_row
    from aft_ray.training.trainer import EpochOrder, RayCheckpoints, TargetTrainer

    config = plan.job.config
    args = sft_arguments(plan, task, scratch, universal)
    tokenizer = AutoTokenizer.from_pretrained(model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    padded = DataCollatorForLanguageModeling(pad_token_id=pad_id)
    packed = DataCollatorForLanguageModeling(pad_token_id=pad_id, padding_free=True)
    to_train, lora = with_lora(config, load_base(config, model))
    held_out = [HeldOutLog(task, config, plan.job.training_set, tokenizer, padded)] if config.eval_steps else []
    trainer = TargetTrainer(
        model=to_train,
        args=args,
        train_dataset=rows_on_this_node(plan.job.training_set, task.shard_hashes, task.variant, config.pack_length),
        processing_class=tokenizer,
        data_collator=padded if config.pack_length is None else packed,
        peft_config=lora,
        callbacks=[EpochOrder(), *held_out, *callbacks, RayCheckpoints(task)],
    )
    trainer.remove_callback(PrinterCallback)
    for callback in held_out:
        callback.attach(trainer, proof_batch(trainer), scratch)
    if config.pack_length is not None:
        row = collated(trainer, [fullest_row(trainer.train_dataset)])
        trainer.add_callback(PackingCheck(row, trainer.head))
    return trainer


def sft_arguments(plan: WorkerPlan, task: TrainTask, scratch: Path, universal: bool) -> Any:
    """Return the settings as TRL's `SFTConfig`."""
    from trl import SFTConfig

    from aft_ray.training.loading import is_bf16

    config = plan.job.config
    on_cpu = not config.gpus_per_worker
    if "tensorboard" in config.report_to:
        os.environ["TENSORBOARD_LOGGING_DIR"] = f"{task.folder.path}/tensorboard"
    return SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=config.batch_size_per_worker,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps or -1,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.lr_scheduler,
        optim=config.optimizer,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        bf16=is_bf16(config),
        gradient_checkpointing=config.gradient_checkpointing,
        deepspeed=preset(config.deepspeed, universal),
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


def preset(name: str, universal: bool = False) -> dict[str, Any] | None:
    """Read a packaged DeepSpeed configuration. None stands for plain data parallelism."""
    if name == "none":
        return None
    settings = json.loads(importlib.resources.files("aft_ray.training").joinpath(f"deepspeed/{name}.json").read_text())
    return settings | {"checkpoint": {"load_universal": True}} if universal else settings


def backend_of(config: TrainingConfig) -> str:
    """Return the torch.distributed backend."""
    return "nccl" if config.gpus_per_worker else "gloo"


def summarize(task: TrainTask, world_size: int, since: float, steps: Any) -> TrainSummary:
    """Return the numbers of a finished training, from its metrics file, which covers all attempts."""
    rows, held_out = task.folder.json_lines(METRICS), task.folder.json_lines(HELD_OUT)
    best = kept_best(task.folder) if task.exports_best else None
    exported = best.step if best else len(rows)
    perplexities = {row["step"]: row["perplexity"] for row in held_out}
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
        adapter_path=task.output.location,
        world_size=world_size,
        resumed_from_step=steps.first_step,
        held_out_perplexity=perplexities.get(exported),
        exported_step=exported,
        stopped_early=has_stopped_early(held_out),
    )


def save(
    plan: WorkerPlan, task: TrainTask, trainer: Any, sums: Any, first_step: int, scratch: Path
) -> tuple[Path, Ending]:
    """Save the adapter or model, the last or the best; return its folder and how the training ended, for the proof."""
    import torch.distributed as dist

    from aft_ray.training.proof import Ending, batch_loss

    batch = proof_batch(trainer)
    best = kept_best(task.folder) if task.exports_best else None
    ending = Ending(
        num_steps=trainer.state.global_step,
        changed_frozen=sums.changed_frozen(trainer.model),
        is_unchanged=plan.job.config.method == "full"  # a LoRA is checked tensor by tensor (check_adapter)
        and first_step < task.num_steps
        and sums.is_unchanged(trainer.model),
        batch=batch,
        loss=best.proof_loss if best else batch_loss(trainer.model, batch, trainer.head),
    )
    folder = partial_output(task, scratch) if trainer.is_world_process_zero() else scratch
    dist.barrier()
    if best is None:
        trainer.save_model(str(folder))
    elif trainer.is_world_process_zero():
        fetch_best(task.folder, best, folder)
    return folder, ending


def agree_on_proof(
    plan: WorkerPlan, task: TrainTask, model: str, folder: Path, ending: Ending, summary: TrainSummary
) -> None:
    """Prove the saved result in the first worker and make it the output. All workers raise Agreed where it fails."""
    import ray.train
    import ray.train.collective
    import torch.distributed as dist

    verdict: list[AftError | None] = [None]
    if ray.train.get_context().get_world_rank() == 0:
        verdict = [_verdict(plan, task, model, folder, ending, summary)]
    ray.train.collective.barrier()  # it waits as long as the proof takes; NCCL's would give up after half an hour
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise Agreed(verdict[0])


def proof_batch(trainer: Any) -> dict[str, Any]:
    """Return the batch on which the trained model and what is saved of it must have one loss."""
    return collated(trainer, shortest(trainer.train_dataset, NUM_PROOF_ROWS))


def collated(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate rows into a batch of the trainer, on its device."""
    batch = trainer.data_collator(rows)
    return {name: batch[name].to(trainer.args.device) for name in MODEL_INPUTS if name in batch}


def _verdict(
    plan: WorkerPlan, task: TrainTask, model: str, folder: Path, ending: Ending, summary: TrainSummary
) -> AftError | None:
    """Return why the result is not what training should have made, or None. Whatever is raised is a verdict.

    The training is over and checkpointed: starting the workers again would repeat the same proof.
    """
    from aft_ray.training.proof import check_adapter, check_ending, check_reload

    config = plan.job.config
    try:
        check_ending(task, ending, task.folder.json_lines(METRICS), summary.stopped_early)
        if config.method == "lora":
            check_adapter(task, folder, resolve_adapter(config.init_adapter) if config.init_adapter else None)
        check_reload(task, config, model, folder, ending)
        finish_folder(task, plan.job, model, summary, folder)
        forget_best(task.folder)
    except Exception as error:
        found = f"variant {task.variant}: the proof ended with {type(error).__name__}: {error}"
        found = str(error) if isinstance(error, AftError) else found
        return TrainingFailed(f"{found}. What was trained is kept: {keep_unproved(task, folder)}")
    return None
