"""The tree of exceptions, and the suggestion for an unknown name."""

from __future__ import annotations

import pickle

import pytest

from aft_ray import errors

CLASSES = [found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, errors.AftError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_of_the_tree_takes_one_message_and_can_be_pickled(kind: type[errors.AftError]) -> None:
    error = pickle.loads(pickle.dumps(kind("what happened")))
    assert (type(error), str(error)) == (kind, "what happened")
    assert kind.__name__ in (errors.__doc__ or "")


def test_an_unknown_name_gets_the_most_similar_one_or_all_of_them() -> None:
    assert errors.nearest("sed", ["dir", "seed"]) == "did you mean 'seed'?"
    assert errors.nearest("poem", ["dir", "seed"]) == "known keys: dir, seed"
    assert errors.nearest("poem", ["a", "b"], kind="types") == "known types: a, b"
