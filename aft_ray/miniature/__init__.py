"""The miniature: the whole method on a model small enough to learn in minutes, so that the method itself is under test.

    base     a fresh model and its small tokenizer, pretrained on documents of question-answer pairs
    study    the method with several seeds through the ordinary steps of a run, and what came of it
    answers  the questions of the paper, with intervals over questions and seeds
    headline the answer in a few sentences and one chart
    page     the study's page: answers, table, plots

`python -m aft_ray.miniature` runs it (make miniature); docs/miniature.md tells what it does and what it cannot tell.
"""
