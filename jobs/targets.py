"""selection -> targets: the teacher's aggregations.

python jobs/targets.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("targets")
