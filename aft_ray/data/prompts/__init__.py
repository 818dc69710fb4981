"""Reads prompts from any source, checks them, and removes the ones that should not be trained on.

    from aft_ray.data.prompts import read_prompts
    for row in read_prompts(config.prompts): ...     # the prompts that are kept

A row passes through the modules in this order:

    sources.py          opens a source and yields raw rows, each with its place ("prompts.jsonl:3")
    files.py            reads files of any kind, folders and globs
    rows.py             turns a raw row into a prompt, or says what is wrong with it
    questions.py        reads the columns that make the question
    conversations.py    reads a conversation in the layouts that data sets use
    responses.py        reads the answers that a raw row brings along
    removal.py          decides the outcome of each row: kept, failed or removed
    duplicates.py       finds repeated and nearly repeated prompts
    decontamination.py  finds prompts that overlap an evaluation set
    stage.py            writes the kept prompts: the first stage of a run
"""

from aft_ray.data.prompts.removal import read_prompts

__all__ = ["read_prompts"]
