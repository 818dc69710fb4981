"""targets -> target_scores: scores of the target's candidates, and the choice between them, where scores are needed.

python jobs/target_scores.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("target_scores")
