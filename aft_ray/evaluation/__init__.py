"""Evaluation: ask an endpoint, score its answers, and report what follows from them, with intervals.

    ask.py         one prompt -> every draft, the answer and its cost, over HTTP
    stage.py       the same for every held-out prompt, as a resumable stage
    metrics.py     answers + a score function -> rewards, flips, lengths, tokens by system
    perplexity.py  how likely the targets are under prompt only / prompt + proposals, per adapter
    statistics.py  means with their counts and intervals
    examples.py    drafts and answers side by side, with what was checked
    charts.py      inline SVG
    report.py      report.html + results.json

Nothing here knows where scores come from: the caller passes the score function in.
"""
