"""prompts -> proposals: sample drafts from the model to be trained.

python jobs/proposals.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("proposals")
