"""Laws of routing, for any logits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmoe.nn import TaskRouter, route
from reference import routing as slow

laws = settings(deadline=None)


any_number = st.sampled_from([0.0, 1.0, -1e4, 1e4, 1e30, -1e30]) | st.floats(-20, 20)
modes = st.sampled_from(["top1", "soft", "given"])


@st.composite
def logits(draw, values=any_number):
    """Logits of some texts; ties, zeros and huge values included."""
    batch, tasks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    row = st.lists(values, min_size=tasks, max_size=tasks)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)), dtype=torch.float64)


def routed(x, mode, data):
    batch, tasks = x.shape
    ids = st.lists(st.integers(0, tasks - 1), min_size=batch, max_size=batch)
    given_ids = torch.tensor(data.draw(ids)) if mode == "given" else None
    return route(x, mode=mode, given=given_ids), given_ids


@laws
@given(logits(), modes, st.data())
def test_routing_equals_its_slow_twin(x, mode, data):
    routing, given_ids = routed(x, mode, data)
    task_ids, probs, weights = slow.route(x.tolist(), mode, None if given_ids is None else given_ids.tolist())
    assert routing.task_ids.tolist() == task_ids
    torch.testing.assert_close(routing.probs.tolist(), probs)
    torch.testing.assert_close(routing.weights.tolist(), weights)


@laws
@given(logits(), modes, st.data())
def test_probabilities_and_weights_are_never_negative_and_sum_to_one(x, mode, data):
    routing, _ = routed(x, mode, data)
    for shares in (routing.probs, routing.weights):
        assert (shares >= 0).all()
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(x), dtype=torch.float64))


@laws
@given(logits(st.integers(-20, 20).map(float)), st.integers(-100, 100), modes, st.data())
def test_a_constant_added_to_all_logits_changes_nothing(x, constant, mode, data):
    routing, given_ids = routed(x, mode, data)
    shifted = route(x + constant, mode=mode, given=given_ids)
    for before, after in zip(routing, shifted, strict=True):
        torch.testing.assert_close(after, before)


@laws
@given(logits(), st.sampled_from(["top1", "soft"]), st.randoms(use_true_random=False))
def test_permuting_the_tasks_permutes_the_probabilities(x, mode, random):
    order = random.sample(range(x.shape[1]), x.shape[1])
    torch.testing.assert_close(route(x[:, order], mode=mode).probs, route(x, mode=mode).probs[:, order])


@laws
@given(logits())
def test_of_equally_likely_tasks_the_lowest_index_is_taken(x):
    largest = x.max(dim=1, keepdim=True).values
    expected = [row.index(True) for row in (x == largest).tolist()]
    assert route(x).task_ids.tolist() == expected


@laws
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))
def test_the_router_equals_its_slow_twin(batch, num_tasks, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    router = TaskRouter(num_tasks=num_tasks, hidden=hidden)
    for tensor in (router.weight, router.bias, router.mean):
        torch.nn.init.normal_(tensor, generator=generator)
    torch.nn.init.uniform_(router.std, 0.5, 2, generator=generator)
    features = torch.randn(batch, hidden, generator=generator)
    names = ("mean", "std", "weight", "bias")
    expected = slow.task_logits(features.tolist(), *(getattr(router, name).tolist() for name in names))
    torch.testing.assert_close(router(features).tolist(), expected, rtol=1e-5, atol=1e-5)
