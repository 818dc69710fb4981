"""evaluation -> report: report.html and results.json.

python jobs/report.py --config configs/quickstart.yaml
"""

from aft_ray.cli import job

if __name__ == "__main__":
    job("report")
