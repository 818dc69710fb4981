"""Builds a training set from prompts on Ray Data, with one module or package per stage."""

DATA_STAGES = ("prompts", "proposals", "scores", "selection", "targets", "target_scores", "training_set")
"""The stages in order. `proposals.data_stages` names the folders of one run: several proposers have several, and
`target_scores` is there only where targets are scored."""
