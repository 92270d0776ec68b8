"""Laws of the Bradley-Terry loss, for any rewards."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from prefmoe.nn import bradley_terry_loss
from reference import losses as slow

laws = settings(deadline=None)
numbers = st.floats(-30, 30)
shares = st.floats(0, 4)
labels = st.floats(0, 1)


def tensor(values):
    return torch.tensor(list(values), dtype=torch.float64)


@st.composite
def pairs(draw, min_size=1):
    """Keyword arguments of the loss: rewards, target margins, weights and labels of some pairs."""
    rows = draw(
        st.lists(st.tuples(numbers, numbers, st.floats(0, 5), shares, labels), min_size=min_size, max_size=6)
    )
    names = ("chosen", "rejected", "target_margin", "weight", "label")
    return {name: tensor(row[i] for row in rows) for i, name in enumerate(names)}


def loss(arguments, **changes):
    return bradley_terry_loss(**{**arguments, **changes})


@laws
@given(pairs())
def test_the_loss_equals_its_slow_twin(arguments):
    expected = slow.bradley_terry_loss(**{name: value.tolist() for name, value in arguments.items()})
    torch.testing.assert_close(loss(arguments).item(), expected, rtol=1e-9, atol=1e-9)


@laws
@given(pairs(), st.floats(-100, 100))
def test_a_constant_added_to_all_rewards_changes_nothing(arguments, constant):
    shifted = loss(
        arguments, chosen=arguments["chosen"] + constant, rejected=arguments["rejected"] + constant
    )
    torch.testing.assert_close(shifted, loss(arguments), rtol=1e-9, atol=1e-9)


@laws
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6))
def test_swapping_the_sides_changes_the_loss_by_the_margin(rewards):
    chosen, rejected = map(tensor, zip(*rewards, strict=True))
    there = bradley_terry_loss(chosen, rejected, reduction="none")
    back = bradley_terry_loss(rejected, chosen, reduction="none")
    torch.testing.assert_close(back - there, chosen - rejected, rtol=1e-9, atol=1e-9)


@laws
@given(pairs())
def test_swapping_the_sides_and_the_label_changes_nothing(arguments):
    swapped = loss(
        arguments,
        chosen=arguments["rejected"],
        rejected=arguments["chosen"],
        label=1 - arguments["label"],
    )
    torch.testing.assert_close(swapped, loss(arguments), rtol=1e-9, atol=1e-9)


@laws
@given(st.lists(st.sampled_from([-1e30, -1000.0, -1.0, 0.0, 1.0, 1000.0, 1e30]), min_size=1), labels)
def test_value_and_gradient_stay_finite_at_any_margin(margins, label):
    chosen = torch.tensor(margins, requires_grad=True)
    bradley_terry_loss(
        chosen, torch.zeros(len(margins)), label=torch.full((len(margins),), label), reduction="sum"
    ).backward()
    assert chosen.grad is not None
    assert (chosen.grad.abs() <= 1).all()


@laws
@given(pairs(min_size=2), st.data(), st.sampled_from(["mean", "sum"]))
def test_a_pair_of_weight_zero_is_as_if_it_were_not_there(arguments, data, reduction):
    size = len(arguments["chosen"])
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    dropped = {name: value[kept].requires_grad_() for name, value in arguments.items()}
    broken = {name: value.where(kept, float("nan")).requires_grad_() for name, value in arguments.items()}
    broken["weight"] = arguments["weight"] * kept
    broken["label"] = arguments["label"]
    torch.testing.assert_close(loss(broken, reduction=reduction), loss(dropped, reduction=reduction))
    loss(broken, reduction=reduction).backward()
    loss(dropped, reduction=reduction).backward()
    assert (broken["chosen"].grad[~kept] == 0).all()
    torch.testing.assert_close(broken["chosen"].grad[kept], dropped["chosen"].grad)


@laws
@given(pairs())
def test_without_any_weight_loss_and_gradient_are_exactly_zero(arguments):
    chosen = arguments["chosen"].requires_grad_()
    value = loss(arguments, weight=torch.zeros(len(chosen), dtype=torch.float64))
    value.backward()
    assert value.item() == 0
    assert (chosen.grad == 0).all()


@laws
@given(pairs(min_size=2), st.randoms(use_true_random=False))
def test_the_order_of_pairs_changes_nothing(arguments, random):
    order = random.sample(range(len(arguments["chosen"])), len(arguments["chosen"]))
    shuffled = {name: value[order] for name, value in arguments.items()}
    torch.testing.assert_close(loss(shuffled), loss(arguments), rtol=1e-12, atol=1e-12)


@laws
@given(pairs(), st.floats(0.1, 10))
def test_only_the_ratio_of_weights_matters_to_the_mean(arguments, factor):
    assume(arguments["weight"].sum() > 1e-3)
    scaled = loss(arguments, weight=arguments["weight"] * factor)
    torch.testing.assert_close(scaled, loss(arguments), rtol=1e-9, atol=1e-9)


@laws
@given(pairs(), st.data())
def test_a_weight_of_n_is_n_copies_of_the_pair(arguments, data):
    size = len(arguments["chosen"])
    copies = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    repeated = {name: value.repeat_interleave(copies) for name, value in arguments.items()}
    torch.testing.assert_close(
        loss(arguments, weight=copies.double()), loss(repeated, weight=None), rtol=1e-9, atol=1e-9
    )


@laws
@given(numbers, st.floats(0, 5), st.floats(0.01, 5))
def test_a_coin_flip_label_is_best_served_by_equal_rewards(reward, target_margin, step):
    even = {"label": tensor([0.5]), "target_margin": tensor([target_margin])}
    equal = bradley_terry_loss(tensor([reward]), tensor([reward]), **even)
    for apart in (step, -step):
        assert bradley_terry_loss(tensor([reward + apart]), tensor([reward]), **even) >= equal


@laws
@given(pairs(), st.floats(0, 5))
def test_asking_for_a_larger_margin_never_lowers_the_loss(arguments, more):
    demanding = loss(arguments, target_margin=arguments["target_margin"] + more)
    assert demanding >= loss(arguments) - 1e-12


@laws
@given(pairs())
def test_reductions_agree(arguments):
    each = loss(arguments, reduction="none")
    torch.testing.assert_close(each.sum(), loss(arguments, reduction="sum"))
    mean = loss(arguments) * arguments["weight"].sum()
    torch.testing.assert_close(mean, each.sum(), rtol=1e-9, atol=1e-9)
