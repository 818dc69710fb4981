"""Fine-tuning: TRL's `SFTTrainer` inside Ray Train, on ids and labels that the data room wrote.

    run          `train_adapters`: the driver's side, from a `TrainingJob` to finished adapters
    task         `TrainingJob`, the fingerprint of each adapter, `TrainProgress` and `TrainSummary`
    examples     rows of the training set: reading, checking, the order of batches
    packing      several examples in one row without cross-talk
    target_head  the language-model head on target positions only
    loading      the model as training sees it: dtype, attention, 4-bit weights, LoRA
    trainer      the `SFTTrainer` subclass and its callbacks: step log, checkpoints, sums of weights
    held_out     loss and answers on held-out examples while the training goes on
    metrics      metrics.jsonl and held_out.jsonl, written as training goes
    progress     what the driver reports while the workers train
    proof        what must hold before an adapter or model counts as trained
    adapter      the output folder: weights, tokenizer, model card, summary; complete or absent
    export       a finished training as a folder that stands alone: the adapter, or merged into the base model
    worker       what runs in each Ray Train worker
    deepspeed/   the ZeRO presets

Importing this loads neither torch, Ray nor transformers.
"""

from aft_ray.training.run import check_before_training, train_adapters
from aft_ray.training.task import TrainingJob, TrainProgress, TrainSummary

__all__ = ["TrainProgress", "TrainSummary", "TrainingJob", "check_before_training", "train_adapters"]
