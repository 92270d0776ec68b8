"""Laws of the routers' losses, for any logits, lengths of texts, preferences and layouts of groups."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefmoe.nn import (
    ExpertGroups,
    empty_mass_penalty,
    group_hinge_loss,
    group_log_masses,
    group_soft_loss,
    localized_balance_loss,
    mean_by_text,
    route_tokens,
    routing_entropy,
    switch_balance_loss,
    within_group_balance,
)
from reference import router_losses as slow

laws = settings(deadline=None)
few = settings(deadline=None, max_examples=20)  # for laws that six losses must obey
# Made here and not while drawing: the type checker draws random numbers too, which hypothesis does not like.
LAYOUTS = [
    ExpertGroups(tuple("abc"[:number]), sizes, has_empty)
    for number in (2, 3)
    for sizes in itertools.product((1, 2, 3), repeat=number)
    for has_empty in (True, False)
]
AB = ExpertGroups(("a", "b"), (2, 1))

# Every loss as a function of the router's logits, of preferences and of the mask.
LOSSES = {
    "soft": lambda z, q, m, g: group_soft_loss(group_log_masses(z, g), q, m),
    "hinge": lambda z, q, m, g: group_hinge_loss(group_log_masses(z, g), q, m, threshold=0.9),
    "lbc": lambda z, q, m, g: localized_balance_loss(route_tokens(z, g), q, m, g),
    "within_group": lambda z, q, m, g: within_group_balance(z, m, g),
    "switch": lambda z, q, m, g: switch_balance_loss(route_tokens(z, g), m, g, top_k=1),
    "empty": lambda z, q, m, g: empty_mass_penalty(route_tokens(z, g), m, target=0.3),
}
GROUP_LOSSES = ("soft", "hinge", "lbc")
every_loss = pytest.mark.parametrize("name", LOSSES)
group_losses = pytest.mark.parametrize("name", GROUP_LOSSES)


@st.composite
def cases(draw):
    """Texts of different lengths (some empty), each a list of tokens' logits, and a preference or None for each."""
    groups = draw(st.sampled_from(LAYOUTS))
    torch.manual_seed(draw(st.integers(0, 1000)))
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    texts = [
        (2 * torch.randn(length, groups.num_choices, dtype=torch.float64)).tolist() for length in lengths
    ]
    preferences = []
    for _ in texts:
        kind = draw(st.sampled_from(["one", "soft", "none"]))
        shares = torch.rand(len(groups.sizes), dtype=torch.float64).add(0.01)
        one = draw(st.integers(0, len(groups.sizes) - 1))
        hard = [float(group == one) for group in range(len(groups.sizes))]
        preferences.append({"one": hard, "soft": (shares / shares.sum()).tolist(), "none": None}[kind])
    return groups, texts, preferences


def tensors(groups, texts, preferences, *, left=0, right=0):
    """Padded tensors: logits (with grad), targets, mask. Padding holds noise, which must not count."""
    longest = max(len(text) for text in texts) + left + right
    logits = 5 * torch.randn(len(texts), longest, groups.num_choices, dtype=torch.float64)
    mask = torch.zeros(len(texts), longest, dtype=torch.float64)
    for row, text in enumerate(texts):
        for place, token in enumerate(text):
            logits[row, left + place] = torch.tensor(token, dtype=torch.float64)
            mask[row, left + place] = 1.0
    none = [0.0] * len(groups.names)
    target = torch.tensor([preference or none for preference in preferences], dtype=torch.float64)
    return logits.requires_grad_(), target, mask


def value_and_gradient(name, groups, texts, preferences, **padding):
    logits, target, mask = tensors(groups, texts, preferences, **padding)
    loss = LOSSES[name](logits, target, mask, groups)
    loss.backward()
    return loss.detach(), logits.grad, mask


def close(got, expected):
    torch.testing.assert_close(
        got.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8
    )


@laws
@given(cases(), st.floats(0, 0.9), st.floats(0.1, 1), st.floats(0.25, 4), st.integers(1, 9))
def test_every_loss_equals_its_slow_twin(case, fraction, threshold, temperature, top_k):
    groups, texts, preferences = case
    logits, target, mask = tensors(*case)
    masses, weights = group_log_masses(logits, groups), route_tokens(logits, groups)
    top_k = min(top_k, groups.num_experts)
    cooled = group_log_masses(logits, groups, temperature=temperature)
    close(
        group_soft_loss(cooled, target, mask, smoothing=fraction),
        slow.group_soft(texts, preferences, groups.sizes, smoothing=fraction, temperature=temperature),
    )
    close(
        group_hinge_loss(masses, target, mask, threshold=threshold),
        slow.group_hinge(texts, preferences, groups.sizes, threshold=threshold),
    )
    close(
        localized_balance_loss(weights, target, mask, groups, delta=fraction),
        slow.localized_balance(texts, preferences, groups.sizes, delta=fraction),
    )
    close(
        within_group_balance(logits, mask, groups, temperature=temperature),
        slow.within_group(texts, groups.sizes, temperature=temperature),
    )
    close(
        switch_balance_loss(weights, mask, groups, top_k=top_k),
        slow.switch_balance(texts, groups.sizes, top_k=top_k),
    )
    if groups.has_empty:
        close(empty_mass_penalty(weights, mask, target=fraction), slow.empty_mass(texts, target=fraction))
    for row, text in enumerate(texts):
        entropies = [slow.entropy(slow.softmax(token)) for token in text]
        close(routing_entropy(weights)[row][mask[row] > 0], entropies)
        close(mean_by_text(routing_entropy(weights)[..., None], mask)[row, 0], slow.mean(entropies))


@every_loss
@few
@given(case=cases(), left=st.integers(0, 2), right=st.integers(0, 2))
def test_padding_changes_no_loss_and_no_gradient_and_gets_none(name, case, left, right):
    loss, grad, mask = value_and_gradient(name, *case)
    padded_loss, padded_grad, padded_mask = value_and_gradient(name, *case, left=left, right=right)
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_grad[padded_mask > 0], grad[mask > 0])
    assert not padded_grad[padded_mask == 0].any()


@every_loss
@few
@given(case=cases())
def test_every_loss_is_finite_at_least_0_and_has_a_finite_gradient(name, case):
    loss, grad, _ = value_and_gradient(name, *case)
    assert loss >= -1e-12
    assert torch.isfinite(loss)
    assert torch.isfinite(grad).all()


@every_loss
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_huge_logits_give_finite_losses_and_gradients(name, size):
    logits = (size * torch.tensor([[[1.0, -1, 0, 0], [-1, 1, 1, -1]]])).requires_grad_()
    loss = LOSSES[name](logits, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), AB)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@every_loss
def test_no_token_that_counts_is_loss_0_and_gradient_0(name):
    logits = torch.randn(2, 3, 4, requires_grad=True)
    loss = LOSSES[name](logits, torch.eye(2), torch.zeros(2, 3), AB)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@every_loss
@few
@given(case=cases(), shift=st.floats(-50, 50))
def test_shifting_all_logits_of_a_token_changes_no_loss(name, case, shift):
    logits, target, mask = tensors(*case)
    before = LOSSES[name](logits, target, mask, case[0])
    torch.testing.assert_close(LOSSES[name](logits + shift, target, mask, case[0]), before)


@group_losses
@few
@given(case=cases())
def test_rows_without_a_preference_are_as_if_not_there(name, case):
    groups, texts, preferences = case
    kept = [row for row, preference in enumerate(preferences) if preference is not None]
    loss, grad, mask = value_and_gradient(name, *case)
    without = [row for row in range(len(texts)) if row not in kept]
    assert not grad[without].any()
    if not kept:
        assert loss == 0
        return
    alone, alone_grad, alone_mask = value_and_gradient(
        name, groups, [texts[row] for row in kept], [preferences[row] for row in kept]
    )
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(grad[kept][mask[kept] > 0], alone_grad[alone_mask > 0])


@pytest.mark.parametrize("name", ["soft", "hinge"])
@few
@given(case=cases())
def test_the_empty_experts_logit_gets_no_gradient_from_losses_on_conditional_shares(name, case):
    assume(case[0].has_empty)
    assert not value_and_gradient(name, *case)[1][..., -1].any()


@laws
@given(case=cases())
def test_within_group_balance_touches_neither_the_empty_expert_nor_the_balance_between_groups(case):
    groups = case[0]
    grad = value_and_gradient("within_group", *case)[1]
    if groups.has_empty:
        assert not grad[..., -1].any()
    for part in grad[..., : groups.num_experts].split(groups.sizes, dim=-1):
        torch.testing.assert_close(part.sum(dim=-1), torch.zeros_like(part[..., 0]), rtol=0, atol=1e-12)


@laws
@given(st.integers(2, 4), st.floats(0, 0.9), st.integers(0, 1000))
def test_the_group_loss_is_0_where_shares_equal_the_target_and_more_elsewhere(num_groups, smoothing, seed):
    torch.manual_seed(seed)
    target = torch.rand(1, num_groups, dtype=torch.float64).softmax(dim=-1)
    soft = torch.tensor([slow.soft_target(target[0].tolist(), smoothing)], dtype=torch.float64)
    there = soft.log()[None].requires_grad_()
    at_minimum = group_soft_loss(
        there.log_softmax(dim=-1), target, torch.ones(1, 1).double(), smoothing=smoothing
    )
    at_minimum.backward()
    torch.testing.assert_close(at_minimum.detach(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(there.grad, torch.zeros_like(there), rtol=0, atol=1e-12)
    elsewhere = torch.randn(1, 1, num_groups, dtype=torch.float64).log_softmax(dim=-1)
    assert group_soft_loss(elsewhere, target, torch.ones(1, 1).double(), smoothing=smoothing) >= 0


def test_a_group_loss_without_smoothing_is_minus_the_log_of_the_own_share():
    masses = torch.tensor([[[0.2, 0.8]]]).log()
    loss = group_soft_loss(masses, torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), smoothing=0.0)
    assert loss.item() == pytest.approx(-math.log(0.2))


@laws
@given(st.floats(0, 1), st.integers(0, 1000))
def test_soft_preferences_interpolate(share, seed):
    """Exactly in the cross-entropy and the hinge; the KL then takes off the mixture's own entropy."""
    torch.manual_seed(seed)
    masses = torch.randn(1, 3, 2, dtype=torch.float64).log_softmax(dim=-1)
    mask = torch.ones(1, 3, dtype=torch.float64)

    def target(share):
        return torch.tensor([[share, 1 - share]], dtype=torch.float64)

    def cross_entropy(share):
        soft = torch.tensor(slow.soft_target([share, 1 - share], 0.1), dtype=torch.float64)
        return group_soft_loss(masses, target(share), mask, smoothing=0.1) + torch.special.entr(soft).sum()

    def hinge(share):
        return group_hinge_loss(masses, target(share), mask, threshold=0.7)

    for loss in (cross_entropy, hinge):
        torch.testing.assert_close(loss(share), share * loss(1.0) + (1 - share) * loss(0.0))


@pytest.mark.parametrize("name", ["lbc", "soft", "hinge"])
def test_descent_on_a_group_loss_moves_mass_to_the_own_group(name):
    """With the signs of the paper, "lbc" would send a text away from its own experts."""
    logits = torch.zeros(2, 3, 3, requires_grad=True)
    groups = ExpertGroups(("a", "b"), (1, 1))
    optimizer = torch.optim.SGD([logits], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        LOSSES[name](logits, torch.eye(2), torch.ones(2, 3), groups).backward()
        optimizer.step()
    shares = group_log_masses(logits, groups).exp()
    assert (shares[0, :, 0] > 0.52).all()
    assert (shares[1, :, 1] > 0.52).all()


def test_lbc_is_0_where_importance_times_mass_is_equal():
    """(1 - delta) * 0.55 = (1 + delta) * 0.45 with delta 0.1."""
    weights = torch.tensor([[[0.55, 0.45]]])
    groups = ExpertGroups(("a", "b"), (1, 1), has_empty=False)
    loss = localized_balance_loss(weights, torch.tensor([[1.0, 0.0]]), torch.ones(1, 1), groups, delta=0.1)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 0.0, 0.0], 0.0),
        ([1e4, 0.0, 0.0], 2.0),  # K - 1
        ([math.log(2), 0.0, 0.0], 3 * (0.25 + 0.0625 + 0.0625) - 1),
    ],
    ids=["uniform", "collapsed", "2:1:1"],
)
def test_within_group_balance_is_the_squared_coefficient_of_variation(logits, expected):
    groups = ExpertGroups(("a",), (3,), has_empty=False)
    loss = within_group_balance(torch.tensor([[logits]]), torch.ones(1, 1), groups)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@laws
@given(st.integers(1, 4), st.booleans())
def test_the_switch_loss_is_1_where_all_experts_carry_the_same(num_experts, has_empty):
    """Token i likes expert i best, all by the same margin."""
    groups = ExpertGroups(("a",), (num_experts,), has_empty)
    logits = torch.zeros(1, num_experts, groups.num_choices)
    logits[0, :, :num_experts] = torch.eye(num_experts)
    loss = switch_balance_loss(route_tokens(logits, groups), torch.ones(1, num_experts), groups, top_k=1)
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_the_switch_loss_is_the_number_of_experts_where_one_carries_all():
    logits = torch.tensor([[[1e4, 0.0, 0.0, 0.0]]])
    loss = switch_balance_loss(route_tokens(logits, AB), torch.ones(1, 1), AB, top_k=1)
    torch.testing.assert_close(loss, torch.tensor(3.0))


def test_the_penalty_of_the_empty_mass_pulls_it_to_its_target_from_both_sides():
    for start in (-3.0, 3.0):
        logits = torch.tensor([[[0.0, 0.0, 0.0, start]]], requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=10.0)
        for _ in range(300):
            optimizer.zero_grad()
            LOSSES["empty"](logits, None, torch.ones(1, 1), AB).backward()
            optimizer.step()
        assert route_tokens(logits, AB)[0, 0, -1].item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name", ["soft", "hinge", "lbc", "within_group"])
def test_losses_pass_gradcheck(name):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 0.0], [0.3, 0.7]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, target, mask, AB), logits)
