"""Which answers an aggregation is shown, in which order, and what is shortened when they do not fit the window."""

from __future__ import annotations

from scripted_runs import drafts, finished, prompt_of, run_plan, scripted

from aft_ray.inference import Event, Plan

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")


def inputs_of(events: list[Event], layer: int) -> list[tuple[int, ...]]:
    return [answer.inputs for answer in drafts(events, layer)]


def test_without_shuffle_answers_are_shown_by_index_whoever_was_faster() -> None:
    proposer = scripted(seconds_per_token=0.002, num_tokens=2, slow_on=(0, 2))
    events = run_plan(Plan(num_proposals=4), proposer, scripted())
    assert finished(events).answer.inputs == (0, 1, 2, 3)
    assert [answer.index for answer in finished(events).layers[0]] == [0, 1, 2, 3]


def test_shuffle_is_one_order_per_layer_and_the_text_follows_it() -> None:
    engine = scripted()
    events = run_plan(Plan(num_proposals=6, num_layers=3, shuffle=True), engine)
    orders = [inputs_of(events, 1)[0], inputs_of(events, 2)[0], finished(events).answer.inputs]
    assert all(len(set(inputs_of(events, layer))) == 1 for layer in (1, 2))
    assert len(set(orders)) == 3
    for layer, order in enumerate(orders):
        assert sorted(order) == [0, 1, 2, 3, 4, 5]
        prompt = prompt_of(engine.requests[layer + 1])
        places = [prompt.index(finished(events).layers[layer][index].text) for index in order]
        assert places == sorted(places)


def test_shuffle_is_fixed_by_run_seed_and_prompt() -> None:
    def order(run_seed: int, prompt_id: str) -> tuple[int, ...]:
        plan = Plan(num_proposals=6, shuffle=True)
        return finished(run_plan(plan, scripted(), run_seed=run_seed, prompt_id=prompt_id)).answer.inputs

    assert order(1, "p-1") == order(1, "p-1")
    assert len({order(1, "p-1"), order(2, "p-1"), order(1, "p-2")}) == 3


def test_each_slot_draws_its_own_subset() -> None:
    engine = scripted()
    events = run_plan(Plan(num_proposals=6, num_layers=2, subset_size=3), engine)
    subsets = inputs_of(events, 1)
    assert len(set(subsets)) > 1
    assert all(len(set(subset)) == 3 and list(subset) == sorted(subset) for subset in subsets)
    assert len(finished(events).answer.inputs) == 3
    for answer in finished(events).layers[1]:
        [request] = [r for r in engine.requests if answer.seed in r.seeds]
        shown = [a.index for a in finished(events).layers[0] if a.text in prompt_of(request)]
        assert tuple(shown) == answer.inputs


def test_subsets_are_fixed_by_the_run_seed() -> None:
    def subsets(run_seed: int) -> list[tuple[int, ...]]:
        plan = Plan(num_proposals=6, num_layers=2, subset_size=3, shuffle=True)
        return inputs_of(run_plan(plan, scripted(), run_seed=run_seed), 1)

    assert subsets(1) == subsets(1) != subsets(2)


def test_a_shuffled_subset_comes_in_its_own_order() -> None:
    plan = Plan(num_proposals=6, num_layers=2, subset_size=5, shuffle=True)
    subsets = inputs_of(run_plan(plan, scripted()), 1)
    assert any(list(subset) != sorted(subset) for subset in subsets)
    assert len(set(subsets)) == 6


def test_slots_that_drew_the_same_share_one_request() -> None:
    engine = scripted()
    events = run_plan(Plan(num_proposals=6, num_layers=2, subset_size=1), engine)
    subsets = inputs_of(events, 1)
    assert len(engine.requests) == 2 + len(set(subsets)) < 2 + 6
    assert sum(len(request.seeds) for request in engine.requests) == 13


def test_slots_that_see_equal_texts_share_one_request_though_they_drew_different_answers() -> None:
    proposer, aggregator = scripted(answers=("same",)), scripted()
    events = run_plan(Plan(num_proposals=6, num_layers=2, subset_size=2), proposer, aggregator)
    assert len(set(inputs_of(events, 1))) > 1
    assert [len(request.seeds) for request in aggregator.requests] == [6, 1]


def test_a_subset_of_all_k_is_the_plain_method() -> None:
    plain, full = scripted(), scripted()
    run_plan(Plan(num_proposals=4, num_layers=2, shuffle=True), plain, request_id="r")
    run_plan(Plan(num_proposals=4, num_layers=2, shuffle=True, subset_size=4), full, request_id="r")
    assert plain.requests == full.requests


def test_a_subset_larger_than_what_is_usable_is_all_of_it() -> None:
    events = run_plan(Plan(num_proposals=5, num_layers=2, subset_size=4), scripted(fail_on=(0, 4)), scripted())
    assert inputs_of(events, 1) == [(1, 2, 3)] * 5


def test_duplicates_are_dropped_before_the_draw() -> None:
    proposer = scripted(answers=("same", "same", "same", "same", "other"))
    events = run_plan(Plan(num_proposals=5, num_layers=2, subset_size=2, drop_duplicates=True), proposer, scripted())
    assert inputs_of(events, 1) == [(0, 4)] * 5
