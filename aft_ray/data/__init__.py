"""Builds a training set from prompts on Ray Data, with one module or package per stage."""

DATA_STAGES = ("prompts", "proposals", "scores", "selection", "targets", "training_set")
"""The stages in order. `proposals.data_stages` also names the folders of several proposers."""
