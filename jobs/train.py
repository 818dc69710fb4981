"""training_set -> model: one LoRA adapter per variant.

python jobs/train.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("train")
