"""The line from prompts to report: the order of its steps and how each one runs. It knows every room and contains none.

steps.py        what each step does, `run_steps`
checks.py       what is known to fail before the first token
endpoints.py    remote endpoints answer one token before anything is paid for
evaluate.py     endpoint -> answers, targets -> perplexity
summary.py      what the folders hold -> the report, and the tables at the end of a run
environment.py  the variables that workers must have, where they are
upload.py       what a job takes along
submitting.py   a job on a cluster
cluster.py      connecting to Ray, or starting it
"""

from aft_ray.data import DATA_STAGES

LINE = (*DATA_STAGES, "train", "evaluate", "miniature", "report")
"""Every step of a run, in order; `steps.STEPS` holds the function of each."""
