"""source -> prompts: read, check and shard the prompts.

python jobs/prompts.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("prompts")
