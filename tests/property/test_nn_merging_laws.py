"""Laws of merging, for any deltas of any number of tasks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmoe.nn import elect_mask_rescale
from reference import merging as slow

laws = settings(deadline=None)


@st.composite
def models(draw):
    """What each of some tasks added to two weight tensors; some values are 0."""
    tasks, rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 1000)))
    deltas = [torch.randn(tasks, rows, columns).double(), torch.randn(tasks, columns).double()]
    return [delta * (torch.rand_like(delta) < 0.8) for delta in deltas]


def by_task(deltas):
    """All weights of the model in a row, for each task."""
    return torch.cat([delta.flatten(1) for delta in deltas], dim=1)


@laws
@given(models())
def test_merging_equals_its_slow_twin(deltas):
    expected = torch.tensor(slow.elect_mask_rescale(by_task(deltas).tolist()), dtype=torch.float64)
    torch.testing.assert_close(by_task(elect_mask_rescale(deltas)), expected)


@laws
@given(models())
def test_one_task_alone_is_given_back(deltas):
    alone = [delta[:1] for delta in deltas]
    torch.testing.assert_close(elect_mask_rescale(alone), alone)


@laws
@given(models())
def test_a_task_gets_no_weight_against_its_own_sign_and_keeps_its_mean_size(deltas):
    own, merged = by_task(deltas), by_task(elect_mask_rescale(deltas))
    assert (own * merged >= 0).all()
    kept = merged.abs().sum(dim=1) > 0  # a task whose every sign lost keeps nothing
    torch.testing.assert_close(merged.abs().sum(dim=1)[kept], own.abs().sum(dim=1)[kept])


@laws
@given(models(), st.randoms(use_true_random=False))
def test_the_order_of_tasks_does_not_matter(deltas, random):
    order = list(range(len(deltas[0])))
    random.shuffle(order)
    permuted = elect_mask_rescale([delta[order] for delta in deltas])
    torch.testing.assert_close(permuted, [delta[order] for delta in elect_mask_rescale(deltas)])


def test_where_all_tasks_agree_they_share_the_largest():
    (merged,) = elect_mask_rescale([torch.tensor([[1.0, 2.0], [3.0, 1.0]])])
    torch.testing.assert_close(merged, torch.tensor([[3.0, 2.0], [3.0, 2.0]]) * torch.tensor([[0.6], [0.8]]))


def test_tasks_that_added_nothing_get_nothing():
    assert torch.equal(elect_mask_rescale([torch.zeros(2, 3)])[0], torch.zeros(2, 3))
