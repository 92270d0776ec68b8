"""Laws of the token router, for any logits, groups, temperature, top-k and steering."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from prefmoe.nn import (
    ExpertGroups,
    LoraBank,
    RecurrentRouter,
    group_log_masses,
    route_tokens,
    steering_factors,
)
from reference import token_routing as slow

laws = settings(deadline=None, max_examples=30)
any_logit = st.one_of(st.floats(-4, 4), st.sampled_from([0.0, 1.0, 1e4, -1e4, 1e30, -1e30]))


# Made here and not while drawing: the type checker draws random numbers too, which hypothesis does not like.
LAYOUTS = [
    ExpertGroups(tuple("abc"[:number]), sizes, has_empty)
    for number in (1, 2, 3)
    for sizes in itertools.product((1, 2, 3), repeat=number)
    for has_empty in (True, False)
]
layouts = st.sampled_from(LAYOUTS)


@st.composite
def wild_cases(draw):
    """Any logits, ties and huge ones included, with any temperature, top-k and factors of 0 to 5."""
    groups = draw(layouts)
    row = st.lists(any_logit, min_size=groups.num_choices, max_size=groups.num_choices)
    logits = torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))
    number = groups.num_choices
    factors = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 5.0]), min_size=number, max_size=number))
    assume(any(factors))
    return (
        logits,
        groups,
        {
            "temperature": draw(st.floats(0.25, 4)),
            "top_k": draw(st.none() | st.integers(1, groups.num_experts)),
            "log_factors": torch.tensor(factors).log() if draw(st.booleans()) else None,
        },
    )


@st.composite
def plain_cases(draw):
    """float64 logits about as large as real ones, without ties."""
    groups = draw(layouts)
    torch.manual_seed(draw(st.integers(0, 1000)))
    logits = 3 * torch.randn(draw(st.integers(1, 4)), groups.num_choices, dtype=torch.float64)
    return logits, groups


@laws
@given(wild_cases())
def test_weights_are_at_least_0_and_sum_to_1_for_any_logits(case):
    logits, groups, options = case
    weights = route_tokens(logits, groups, **options)
    assert weights.shape == logits.shape
    assert (weights >= 0).all()
    sums = weights.sum(dim=-1)
    if options["top_k"] is None or groups.has_empty:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:
        assert (sums <= 1 + 1e-6).all()


@laws
@given(wild_cases())
def test_top_k_keeps_at_most_k_experts_with_the_weights_they_had(case):
    logits, groups, options = case
    weights = route_tokens(logits, groups, **options)[:, : groups.num_experts]
    dense = route_tokens(logits, groups, **options | {"top_k": None})[:, : groups.num_experts]
    kept = weights > 0
    assert torch.equal(weights[kept], dense[kept])
    top_k = options["top_k"] or groups.num_experts
    assert (kept.sum(dim=-1) <= top_k).all()
    lost = dense.masked_fill(kept, 0.0).amax(dim=-1)
    assert (lost <= weights.masked_fill(~kept, math.inf).amin(dim=-1)).all()


@laws
@given(plain_cases(), st.floats(0.25, 4), st.integers(1, 9), st.booleans(), st.booleans())
def test_weights_equal_their_slow_twin(case, temperature, top_k, sparse, steered):
    logits, groups = case
    top_k = min(top_k, groups.num_experts) if sparse else None
    factors = torch.rand(groups.num_choices, dtype=torch.float64).log() if steered else None
    expected = [
        slow.route_token(
            token,
            groups.sizes,
            has_empty=groups.has_empty,
            temperature=temperature,
            top_k=top_k,
            log_factors=None if factors is None else factors.tolist(),
        )
        for token in logits.tolist()
    ]
    got = route_tokens(logits, groups, temperature=temperature, top_k=top_k, log_factors=factors)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@laws
@given(plain_cases(), st.floats(-50, 50), st.integers(1, 9))
def test_shifting_all_logits_changes_nothing(case, shift, top_k):
    logits, groups = case
    top_k = min(top_k, groups.num_experts)
    torch.testing.assert_close(
        route_tokens(logits + shift, groups, top_k=top_k), route_tokens(logits, groups, top_k=top_k)
    )
    torch.testing.assert_close(group_log_masses(logits + shift, groups), group_log_masses(logits, groups))


@laws
@given(plain_cases(), st.integers(1, 9), st.randoms(use_true_random=False))
def test_permuting_experts_permutes_their_weights(case, top_k, random):
    logits, groups = case
    places = random.sample(range(groups.num_experts), groups.num_experts)
    places += [groups.num_experts] * groups.has_empty
    top_k = min(top_k, groups.num_experts)
    torch.testing.assert_close(
        route_tokens(logits[:, places], groups, top_k=top_k),
        route_tokens(logits, groups, top_k=top_k)[:, places],
    )


@laws
@given(wild_cases())
def test_top_k_of_all_experts_is_the_dense_mixture(case):
    logits, groups, options = case
    everyone = route_tokens(logits, groups, **options | {"top_k": groups.num_experts})
    assert torch.equal(everyone, route_tokens(logits, groups, **options | {"top_k": None}))


@laws
@given(plain_cases(), st.integers(1, 9))
def test_all_weight_on_the_empty_expert_adds_exactly_nothing(case, top_k):
    logits, groups = case
    assume(groups.has_empty)
    only_empty = steering_factors(dict.fromkeys(groups.names, 0.0), groups)
    weights = route_tokens(logits, groups, log_factors=only_empty, top_k=min(top_k, groups.num_experts))
    assert torch.equal(weights[:, -1], torch.ones(len(logits), dtype=torch.float64))
    bank = LoraBank(4, 3, num_experts=groups.num_experts, rank=2, alpha=8.0, dtype=torch.float64)
    nn.init.normal_(bank.B)
    base = torch.randn(len(logits), 3, dtype=torch.float64)
    added = bank.mix(torch.randn(len(logits), 4, dtype=torch.float64), weights[:, : groups.num_experts])
    assert torch.equal(base + added, base)


@laws
@given(plain_cases(), st.floats(0.25, 4))
def test_group_masses_equal_their_slow_twin(case, temperature):
    logits, groups = case
    expected = [slow.group_shares(token, groups.sizes, temperature=temperature) for token in logits.tolist()]
    got = group_log_masses(logits, groups, temperature=temperature).exp()
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


@laws
@given(wild_cases())
def test_group_masses_are_finite_and_sum_to_1_for_any_logits(case):
    logits, groups, options = case
    masses = group_log_masses(logits, groups, temperature=options["temperature"])
    assert torch.isfinite(masses).all()
    torch.testing.assert_close(masses.exp().sum(dim=-1), torch.ones(len(logits)))


@laws
@given(plain_cases())
def test_the_empty_expert_has_no_part_in_group_masses(case):
    logits, groups = case
    assume(groups.has_empty)
    other = logits.clone()
    other[:, -1] += 7
    assert torch.equal(group_log_masses(other, groups), group_log_masses(logits, groups))


@laws
@given(plain_cases(), st.floats(0.1, 10))
def test_a_factor_multiplies_the_odds_of_its_group_and_of_no_other(case, factor):
    logits, groups = case
    assume(groups.num_experts > groups.sizes[0])
    before = route_tokens(logits, groups)
    after = route_tokens(logits, groups, log_factors=steering_factors({"a": factor}, groups).double())
    own = groups.sizes[0]
    odds_before = before[:, :own].sum(dim=1) / before[:, own:].sum(dim=1)
    odds_after = after[:, :own].sum(dim=1) / after[:, own:].sum(dim=1)
    torch.testing.assert_close(odds_after, factor * odds_before, rtol=1e-5, atol=0)
    inside = after[:, own:] / after[:, own:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(inside, before[:, own:] / before[:, own:].sum(dim=1, keepdim=True))


@laws
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 3))
def test_the_recurrent_router_equals_its_slow_twin_over_three_layers(seed, size, num_tokens):
    torch.manual_seed(seed)
    cell = nn.GRUCell(size, size, bias=False, dtype=torch.float64)
    state, slow_states = None, [[0.0] * size] * num_tokens
    for _ in range(3):
        router = RecurrentRouter(4, num_choices=3, size=size).double()
        nn.init.normal_(router.projection)
        x = torch.randn(num_tokens, 4, dtype=torch.float64)
        logits, state = router(x, state, cell)
        pairs = [
            slow.recurrent_layer(
                token,
                below,
                router.projection.tolist(),
                router.weight.tolist(),
                cell.weight_ih.tolist(),
                cell.weight_hh.tolist(),
            )
            for token, below in zip(x.tolist(), slow_states, strict=True)
        ]
        slow_states = [state for _, state in pairs]
        torch.testing.assert_close(logits, torch.tensor([logits for logits, _ in pairs], dtype=torch.float64))
        torch.testing.assert_close(state, torch.tensor(slow_states, dtype=torch.float64))


def test_the_gradient_of_top_1_reaches_the_router_through_the_gate():
    """Scaled by its probability, so that even one expert alone teaches the router."""
    logits = torch.tensor([[1.0, 0.0, 0.5]], requires_grad=True)
    route_tokens(logits, ExpertGroups(("a", "b"), (1, 1)), top_k=1)[0, 0].backward()
    assert (logits.grad != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_at_least_float32(dtype):
    weights = route_tokens(torch.zeros(2, 3, dtype=dtype), ExpertGroups(("a", "b"), (1, 1)))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
