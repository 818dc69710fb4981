"""model -> evaluation: answers of every system, perplexity of the targets.

python jobs/evaluate.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("evaluate")
