"""scores -> selection: the K proposals each prompt keeps.

python jobs/selection.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("selection")
