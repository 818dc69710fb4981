"""The line from prompts to report: which step follows which, and how each is run. Knows every room, contains none.

steps.py        the steps in order, `run_steps`
evaluate.py     endpoint -> answers, targets -> perplexity
summary.py      what the folders hold -> the report, and the table at the end of a run
cluster.py      connecting to Ray, or starting it
"""
