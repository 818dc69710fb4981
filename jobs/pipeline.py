"""Everything, prompts to report; called again, it continues where it stopped.

python jobs/pipeline.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job
from aft_ray.pipeline import LINE

if __name__ == "__main__":
    job(*LINE)
