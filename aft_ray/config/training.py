"""The settings of fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aft_ray.config.strict import Strict


class LoraSettings(Strict):
    """The settings of LoRA. The paper uses rank 8 and does not publish the others."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    """Whether to scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    dora: bool = False
    """Whether to learn magnitude and direction separately (arXiv 2402.09353)."""


DeepSpeedPreset = Literal["none", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


class TrainingConfig(Strict):
    """Fine-tuning on Ray Train and DeepSpeed. It makes one adapter, or whole model, per variant of the training set."""

    method: Literal["lora", "full"] = "lora"
    """`full` trains every weight, and model/<variant> then holds a whole model."""
    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    accelerator_type: str | None = None
    deepspeed: DeepSpeedPreset = "zero2"
    """A packaged DeepSpeed configuration (aft_ray/training/deepspeed/), or `none` for plain data parallelism."""
    lora: LoraSettings = LoraSettings()
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` is QLoRA: the frozen weights have 4 bits. It needs bitsandbytes and a GPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto` takes flash-attn where it is installed and there is a GPU, else PyTorch's own attention (sdpa)."""
    init_adapter: str | None = None
    """Folder of an adapter to start from instead of a fresh one, for a second round of training."""
    learning_rate: float = Field(default=2e-4, gt=0)
    num_epochs: float = Field(default=1, gt=0)
    batch_size_per_worker: int = Field(default=4, ge=1)
    """Number of examples, or packed rows, per step and worker."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    pack_length: int | None = Field(default=None, ge=16)
    """Length in tokens of the rows into which examples are packed, each with its own positions and attention. None
    pads batches of examples of similar length instead."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Number of steps between evaluations during training, and one at the end: the loss of the held-out examples of
    every variant, and sample answers. None switches them off."""
    num_eval_examples: int = Field(default=64, ge=1)
    """Most held-out examples per variant."""
    num_eval_answers: int = Field(default=2, ge=0)
    """Number of held-out examples that are answered greedily; held_out.jsonl holds the answers."""
    save_steps: int = Field(default=200, ge=1)
    """Number of steps between checkpoints."""
    bf16: bool | None = None
    """Whether to compute in bfloat16. None does where the workers' processors multiply in it, else takes float32."""
    gradient_checkpointing: bool = False
    max_failures: int = Field(default=2, ge=0)
    """Most restarts of the workers from the last checkpoint after a failure. Preempted nodes do not count."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers that log every step, through transformers. Their packages must be installed."""

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        targets = (self.lora.target_modules,) if isinstance(self.lora.target_modules, str) else self.lora.target_modules
        if self.quantization == "nf4" and self.gpus_per_worker == 0:
            raise ValueError("quantization nf4 needs a GPU (bitsandbytes): set gpus_per_worker, or quantization: none")
        if self.quantization == "nf4" and self.method == "full":
            raise ValueError("quantization nf4 trains an adapter on frozen weights: set method: lora")
        if self.quantization == "nf4" and self.deepspeed.startswith("zero3"):
            raise ValueError(
                f"quantization nf4 with deepspeed {self.deepspeed}: ZeRO-3 cannot split weights packed in 4 bits; "
                "use zero2"
            )
        if self.method == "lora" and any("lm_head" in target for target in targets):
            raise ValueError(
                "lora.target_modules with lm_head: the loss is computed from the head's own weight on target "
                "positions only, so an adapter on it would never be trained; leave it out"
            )
        if self.attention == "flash_attention_2" and not (self.gpus_per_worker and self.bf16 is not False):
            raise ValueError(
                "attention flash_attention_2 needs a GPU and bf16: set gpus_per_worker and bf16, or attention: auto"
            )
        if self.init_adapter is not None and self.method == "full":
            raise ValueError(
                "init_adapter starts from a LoRA: with method full start from a merged model (aft-ray export --merged)"
            )
        return self
