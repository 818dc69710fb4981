"""targets -> training_set: ids and labels, written once.

python jobs/training_set.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("training_set")
