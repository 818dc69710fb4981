"""The settings of fine-tuning."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from aft_ray.config.strict import Strict


class LoraSettings(Strict):
    """The settings of LoRA. The paper uses rank 8 and does not publish the others."""

    rank: int = Field(default=8, ge=1)
    """Rank of the two factors."""
    alpha: int = Field(default=16, ge=1)
    """Scale of the adapter's output, as a multiple of 1 / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that are dropped in training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter, in peft's words: `all-linear`, a regular expression, or a list of names."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapter, such as `embed_tokens` and `lm_head` where the base
    model has tokens that it never saw. vLLM cannot load such an adapter; it serves the merged model."""
    rslora: bool = False
    """Whether to scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    dora: bool = False
    """Whether to learn magnitude and direction separately (arXiv 2402.09353)."""


DeepSpeedPreset = Literal["none", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


class TrainingConfig(Strict):
    """Fine-tuning on Ray Train and DeepSpeed. It makes one adapter, or whole model, per variant of the training set."""

    method: Literal["lora", "full"] = "lora"
    """`full` trains every weight, and `model/<variant>` then holds a whole model."""
    num_workers: int = Field(default=1, ge=1)
    """Number of workers, which hold one model or its shards together."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """Number of CPUs per worker."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """Number of GPUs per worker. None: one if the cluster has GPUs or can start nodes with them, else 0."""
    accelerator_type: str | None = None
    """Ray's label of the accelerator, such as `H100`."""
    deepspeed: DeepSpeedPreset = "zero2"
    """A packaged DeepSpeed configuration (aft_ray/training/deepspeed/), or `none` for plain data parallelism."""
    lora: LoraSettings = LoraSettings()
    """The adapter."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` is QLoRA: the frozen weights have 4 bits. It needs bitsandbytes and a GPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` leaves the choice to transformers: PyTorch's own attention (sdpa) where the model has it, else eager."""
    init_adapter: str | None = None
    """Adapter to start from instead of a fresh one, for a second round of training: a folder, a URL, or a hub id."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Largest learning rate, reached at the end of the warm-up."""
    num_epochs: float = Field(default=1, gt=0)
    """Number of passes over the training set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Number of optimizer steps, in place of `num_epochs`; the schedule of the learning rate ends with them."""
    batch_size_per_worker: int = Field(default=4, ge=1)
    """Number of examples, or packed rows, per step and worker."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Number of batches of a worker per step of the optimizer."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate changes after the warm-up, in transformers' words: down to 0, or not at all."""
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        "adamw_torch_fused"
    )
    """The optimizer, in transformers' words. Those of 8 bits need bitsandbytes and a GPU."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of the weights per step, as a multiple of the learning rate."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm to which a larger gradient is scaled down."""
    pack_length: int | None = Field(default=None, ge=16)
    """Length in tokens of the rows into which examples are packed, each with its own positions and attention. None
    pads batches of examples of similar length instead."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Number of steps between evaluations during training, and one at the end: the loss of the held-out examples of
    every variant, and sample answers. None switches them off."""
    num_eval_examples: int = Field(default=64, ge=1)
    """Largest number of held-out examples per variant."""
    num_eval_answers: int = Field(default=2, ge=0)
    """Number of held-out examples that are answered greedily; held_out.jsonl holds the answers."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Number of evaluations in a row without a lower loss of the held-out examples of the variant in training, after
    which the training ends. None trains to the last step. Needs `eval_steps`."""
    load_best_model_at_end: bool = False
    """Whether the result is the state with the lowest of these losses instead of the last one. Needs `eval_steps`."""
    save_steps: int = Field(default=200, ge=1)
    """Number of steps between checkpoints."""
    bf16: bool | None = None
    """Whether to compute in bfloat16. None: if the workers' processors support it; else training computes in
    float32."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass: less memory, a third more time."""
    max_failures: int = Field(default=2, ge=0)
    """Largest number of restarts of the workers from the last checkpoint after failures. Restarts after a preemption do
    not count."""
    max_wait_s: float = Field(default=600, ge=0)
    """Seconds that a training which lost nodes waits for others, on a cluster that cannot start any by itself."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that log every step, through transformers. Their packages must be installed."""

    @property
    def watches_held_out(self) -> bool:
        """Whether the losses of held-out examples decide what is trained."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def planned_steps(self, num_rows: int) -> int:
        """Return the number of optimizer steps. The last batch of an epoch is filled up, and counts as a whole one."""
        if self.max_steps is not None:
            return self.max_steps
        batches = math.ceil(num_rows / (self.batch_size_per_worker * self.num_workers))
        return math.ceil(self.num_epochs * math.ceil(batches / self.gradient_accumulation_steps))

    def why_never_stopped_early(self, num_steps: int) -> str | None:
        """Return why a training of so many steps cannot run out of patience; None where it can, or need not."""
        if self.early_stopping_patience is None or self.eval_steps is None:
            return None
        earliest = (self.early_stopping_patience + 1) * self.eval_steps  # the first evaluation sets the loss to beat
        if earliest < num_steps:
            return None
        return (
            f"training.early_stopping_patience {self.early_stopping_patience} with training.eval_steps "
            f"{self.eval_steps} can stop a training at step {earliest} at the earliest, and this one ends at step "
            f"{num_steps}"
        )

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        targets = self.lora.target_modules
        names = (targets,) if isinstance(targets, str) else targets
        if self.quantization == "nf4":
            if self.gpus_per_worker == 0:
                raise ValueError(
                    "quantization nf4 needs a GPU (bitsandbytes): set gpus_per_worker, or quantization: none"
                )
            if self.method == "full":
                raise ValueError("quantization nf4 trains an adapter on frozen weights: set method: lora")
            if self.deepspeed.startswith("zero3"):
                raise ValueError(
                    f"quantization nf4 with deepspeed {self.deepspeed}: ZeRO-3 cannot split weights packed in 4 bits; "
                    "use zero2"
                )
        if self.lora.modules_to_save and self.deepspeed.startswith("zero3"):
            raise ValueError(
                f"lora.modules_to_save with deepspeed {self.deepspeed}: ZeRO-3 splits the modules that would be "
                "copied; use zero2"
            )
        if self.method == "lora" and any("lm_head" in name for name in names):
            raise ValueError(
                "lora.target_modules with lm_head: the loss is computed from the head's own weight on target "
                "positions only, so an adapter on it would never be trained; leave it out, or train it whole with "
                "lora.modules_to_save"
            )
        if self.eval_steps is None and self.watches_held_out:
            name = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            raise ValueError(f"{name} compares the losses of held-out examples: set eval_steps, or leave it out")
        if self.attention == "flash_attention_2" and (self.gpus_per_worker == 0 or self.bf16 is False):
            raise ValueError(
                "attention flash_attention_2 needs a GPU and bf16: set gpus_per_worker and bf16, or attention: auto"
            )
        if self.init_adapter is not None and self.method == "full":
            raise ValueError(
                "init_adapter starts from a LoRA: with method full start from a merged model (aft-ray export --merged)"
            )
        return self
