"""From prompts to a training set: one module per stage, on Ray Data."""

DATA_STAGES = ("prompts", "proposals", "scores", "selection", "targets", "training_set")
"""The stages in order. With several proposers `proposals.data_stages` names their folders too."""
