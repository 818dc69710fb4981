"""Fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from aft_ray.config.strict import Strict


class LoraSettings(Strict):
    """LoRA (paper: rank 8; the rest is not published)."""

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732)."""
    dora: bool = False
    """Learn magnitude and direction apart (arXiv 2402.09353)."""


DeepSpeedPreset = Literal["none", "zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]


class TrainingConfig(Strict):
    """Fine-tuning on Ray Train + DeepSpeed, one adapter (or whole model) per variant of the training set."""

    method: Literal["lora", "full"] = "lora"
    """`full`: every weight is trained, and model/<variant> holds a whole model."""
    num_workers: int = Field(default=1, ge=1)
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    accelerator_type: str | None = None
    deepspeed: DeepSpeedPreset = "zero2"
    """A packaged DeepSpeed configuration (aft_ray/training/deepspeed/); `none`: plain data parallelism."""
    lora: LoraSettings = LoraSettings()
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: QLoRA, frozen weights in 4 bits (bitsandbytes; GPU)."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto`: flash-attn where it is installed and there is a GPU, else PyTorch's own (sdpa)."""
    init_adapter: str | None = None
    """Start from this adapter instead of a fresh one (a second round)."""
    learning_rate: float = Field(default=2e-4, gt=0)
    num_epochs: float = Field(default=1, gt=0)
    batch_size_per_worker: int = Field(default=4, ge=1)
    """Examples, or packed rows, per step and worker."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    pack_length: int | None = Field(default=None, ge=16)
    """Pack examples into rows of this many tokens, each with positions and attention of its own. None: batches of
    examples of like length, padded."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Every so many steps, and at the end: loss of the held-out examples of every variant in the set, and sample
    answers. None: not during training."""
    num_eval_examples: int = Field(default=64, ge=1)
    """Held-out examples per variant."""
    num_eval_answers: int = Field(default=2, ge=0)
    """Of these, how many are answered (greedily), to be read in held_out.jsonl."""
    save_steps: int = Field(default=200, ge=1)
    bf16: bool | None = None
    """Compute in bfloat16. None: where the workers' processors multiply in it, else in float32."""
    gradient_checkpointing: bool = False
    max_failures: int = Field(default=2, ge=0)
    """Times Ray Train restarts the workers from the last checkpoint after a failure. Preempted nodes do not count."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers told of every step, through transformers; the package must be installed."""

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
