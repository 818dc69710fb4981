"""Error objects cross processes: a caller must be able to distinguish what a replica raises."""

from __future__ import annotations

import pickle

import pytest
from ray.exceptions import RayTaskError

from aft_ray.serving.errors import HttpError


def test_an_error_that_ray_brings_from_a_replica_is_the_one_that_was_raised() -> None:
    error = HttpError(503, "try again", param="model", code="unavailable", type="unavailable", retry_after_s=2)
    brought = pickle.loads(pickle.dumps(RayTaskError("num_open", "its traceback", error)))
    with pytest.raises(HttpError) as caught:
        raise brought.as_instanceof_cause()
    there = caught.value.cause
    assert (there.status, there.body, there.retry_after_s, str(there)) == (503, error.body, 2, "try again")
