"""Laws of aggregators and ensembles, for any experts and members."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmoe.nn import build_aggregator, mean_reward, uncertainty_weighted, worst_case
from reference import aggregation as slow

laws = settings(deadline=None)
kinds = st.sampled_from(["task_head", "linear_scores", "linear_states", "mlp"])
sizes = st.integers(1, 4)


@st.composite
def cases(draw):
    """A kind, a float64 aggregator with random parameters, states and scores."""
    kind, batch, num_experts, hidden = draw(kinds), draw(sizes), draw(sizes), draw(sizes)
    torch.manual_seed(draw(st.integers(0, 1000)))
    aggregator = build_aggregator(kind, num_experts=num_experts, hidden=hidden).double()
    for parameter in aggregator.parameters():
        torch.nn.init.normal_(parameter)
    states = torch.randn(batch, num_experts, hidden, dtype=torch.float64)
    return kind, aggregator, states, torch.randn(batch, num_experts, dtype=torch.float64)


@st.composite
def ensembles(draw):
    members, batch = draw(sizes), draw(sizes)
    row = st.lists(st.floats(-10, 10), min_size=batch, max_size=batch)
    return torch.tensor(draw(st.lists(row, min_size=members, max_size=members)), dtype=torch.float64)


@laws
@given(cases())
def test_every_aggregator_equals_its_slow_twin(case):
    kind, aggregator, states, scores = case
    parameters = {name: value.tolist() for name, value in aggregator.state_dict().items()}
    expected = [
        slow.aggregate(kind, z, s, parameters) for z, s in zip(states.tolist(), scores.tolist(), strict=True)
    ]
    torch.testing.assert_close(aggregator(states, scores).tolist(), expected)


@laws
@given(cases())
def test_a_batch_equals_its_texts_one_by_one(case):
    _, aggregator, states, scores = case
    alone = [aggregator(states[i : i + 1], scores[i : i + 1]) for i in range(len(states))]
    torch.testing.assert_close(aggregator(states, scores), torch.cat(alone))


@laws
@given(cases())
def test_a_new_weighted_sum_of_scores_is_the_task_head(case):
    _, _, states, scores = case
    sizes_of_case = {"num_experts": states.shape[1], "hidden": states.shape[2]}
    new = build_aggregator("linear_scores", **sizes_of_case)
    head = build_aggregator("task_head", **sizes_of_case)
    assert torch.equal(new(states, scores), head(states, scores))


@laws
@given(ensembles(), st.floats(0, 3))
def test_ensembles_equal_their_slow_twins(members, penalty):
    torch.testing.assert_close(mean_reward(members).tolist(), slow.mean_reward(members.tolist()))
    assert worst_case(members).tolist() == slow.worst_case(members.tolist())
    torch.testing.assert_close(
        uncertainty_weighted(members, penalty=penalty).tolist(),
        slow.uncertainty_weighted(members.tolist(), penalty),
    )


@laws
@given(ensembles(), st.floats(0, 3))
def test_careful_ensembles_never_exceed_the_mean_and_no_penalty_is_the_mean(members, penalty):
    mean = mean_reward(members)
    assert (worst_case(members) <= mean + 1e-12).all()
    assert (uncertainty_weighted(members, penalty=penalty) <= mean).all()
    assert torch.equal(uncertainty_weighted(members, penalty=0.0), mean)


@laws
@given(ensembles(), st.floats(-10, 10), st.floats(0, 3))
def test_a_constant_added_to_every_member_is_added_to_the_ensemble(members, constant, penalty):
    for ensemble in (mean_reward, worst_case, lambda m: uncertainty_weighted(m, penalty=penalty)):
        torch.testing.assert_close(
            ensemble(members + constant), ensemble(members) + constant, rtol=1e-9, atol=1e-9
        )


@laws
@given(ensembles(), st.integers(1, 4), st.floats(0, 3))
def test_copies_of_all_members_change_nothing(members, copies, penalty):
    for ensemble in (mean_reward, worst_case, lambda m: uncertainty_weighted(m, penalty=penalty)):
        torch.testing.assert_close(ensemble(members.repeat(copies, 1)), ensemble(members))
