"""Fine-tuning: TRL's `SFTTrainer` inside Ray Train, on the ids and labels of the training set.

    run          `train_adapters`: the driver's side, from a `TrainingJob` to finished adapters
    task         `TrainingJob`, the fingerprint of each adapter, `TrainProgress` and `TrainSummary`
    identity     tells models and adapters apart by their content
    rows         the rows of a variant, in a file that the workers of a node map into memory
    examples     checks of examples, and the order of batches
    packing      several examples in one row without cross-talk
    target_head  computes the language-model head on target positions only
    loading      loads the model with the dtype, attention, quantization and LoRA of the settings
    trainer      the `SFTTrainer` subclass and its callbacks: step log, checkpoints, checksums of weights
    resharding   ZeRO's checkpoints of another number of workers
    held_out     loss and answers on held-out examples during training
    best         keeps the state with the lowest held-out loss, where that is what is exported
    metrics      metrics.jsonl and held_out.jsonl, written during training
    progress     the progress reports of the driver while the workers train
    proof        the checks that an adapter or model must pass before it counts as trained
    adapter      the output folder: weights, tokenizer, model card, summary; complete or absent
    export       copies a finished training into a self-contained folder, or merges it into the base model
    failures     what ends a training, and whether the workers are started again
    worker       the code that runs in each Ray Train worker
    deepspeed/   the DeepSpeed presets

Importing this loads neither torch, Ray nor transformers.
"""

from aft_ray.training.run import check_before_training, train_adapters
from aft_ray.training.task import TrainingJob, TrainProgress, TrainSummary

__all__ = ["TrainProgress", "TrainSummary", "TrainingJob", "check_before_training", "train_adapters"]
