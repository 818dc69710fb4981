"""Evaluation: ask an endpoint, score its answers, and report what follows from them, with intervals.

    held_out.py          prompts -> the held-out ones, which the stages below read
    ask.py               one prompt -> every draft, the answer and its cost, over HTTP
    answers.py           the same for every held-out prompt, as a stage
    scores.py            answers -> a score for every text, as a stage
    perplexity_stage.py  targets -> how likely they are under prompt only / prompt + proposals, as a stage
    perplexity.py        perplexities and their differences from these
    metrics.py           scored answers -> rewards, flips, lengths, tokens by system
    statistics.py        means with their counts and intervals
    examples.py          drafts and answers side by side, with what was checked
    charts.py            inline SVG
    report.py            report.html + results.json

Nothing here knows where scores come from: the caller passes the scorer in.
"""
