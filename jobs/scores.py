"""proposals -> scores: a reward for every proposal, or the reason why there is none.

python jobs/scores.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("scores")
