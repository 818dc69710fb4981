"""The tree of exceptions, and the suggestion for an unknown name."""

from __future__ import annotations

from aft_ray import errors


def test_every_class_of_the_tree_can_be_raised_again_by_its_name() -> None:
    classes = [found for found in vars(errors).values() if isinstance(found, type)]
    tree = {found for found in classes if issubclass(found, errors.AftError)} - {errors.AftError}
    assert set(errors.ERRORS.values()) == tree


def test_an_unknown_name_gets_the_most_similar_one_or_all_of_them() -> None:
    assert errors.nearest("sed", ["dir", "seed"]) == "did you mean 'seed'?"
    assert errors.nearest("poem", ["dir", "seed"]) == "known keys: dir, seed"
    assert errors.nearest("poem", ["a", "b"], kind="types") == "known types: a, b"
