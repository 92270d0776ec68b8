"""Laws of the convex fits, for any small data set."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefmoe.nn import bradley_terry_loss, fit_bradley_terry, fit_softmax

laws = settings(deadline=None)
penalties = st.floats(1e-3, 1)


@st.composite
def pair_sets(draw):
    """Differences, weights and labels of some pairs."""
    pairs, features = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    differences = draw(st.floats(0.1, 5)) * torch.randn(
        pairs, features, generator=generator, dtype=torch.float64
    )
    weight = torch.rand(pairs, generator=generator, dtype=torch.float64)
    label = torch.rand(pairs, generator=generator, dtype=torch.float64)
    return {"differences": differences, "weight": weight, "label": label}


@st.composite
def labelled(draw):
    """Features, labels and the number of classes; some classes may have no row."""
    rows, features, classes = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return (
        torch.randn(rows, features, generator=generator, dtype=torch.float64),
        torch.tensor(labels),
        classes,
    )


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@laws
@given(pair_sets(), penalties)
def test_the_gradient_vanishes_where_the_fit_ends(pairs, l2):
    solution = fit_bradley_terry(**pairs, l2=l2).requires_grad_()
    margins = pairs["differences"] @ solution
    fit = bradley_terry_loss(margins, torch.zeros_like(margins), weight=pairs["weight"], label=pairs["label"])
    (fit + l2 / 2 * solution.square().sum()).backward()
    assert solution.grad.abs().max() < 1e-7


@laws
@given(pair_sets(), penalties)
def test_swapping_a_pair_and_its_label_changes_nothing(pairs, l2):
    swapped = {**pairs, "differences": -pairs["differences"], "label": 1 - pairs["label"]}
    close(fit_bradley_terry(**swapped, l2=l2), fit_bradley_terry(**pairs, l2=l2))


@laws
@given(pair_sets(), penalties)
def test_reversing_every_preference_reverses_the_weights(pairs, l2):
    reversed_labels = {**pairs, "label": 1 - pairs["label"]}
    close(fit_bradley_terry(**reversed_labels, l2=l2), -fit_bradley_terry(**pairs, l2=l2))


@laws
@given(pair_sets(), penalties, st.integers(2, 4))
def test_copies_of_all_pairs_change_nothing(pairs, l2, copies):
    repeated = {name: value.repeat(copies, *[1] * (value.ndim - 1)) for name, value in pairs.items()}
    close(fit_bradley_terry(**repeated, l2=l2), fit_bradley_terry(**pairs, l2=l2))


@laws
@given(pair_sets(), penalties)
def test_where_the_pairs_say_nothing_the_weights_are_zero(pairs, l2):
    silent = {**pairs, "weight": torch.zeros_like(pairs["weight"])}
    assert not fit_bradley_terry(**silent, l2=l2).any()
    assert not fit_bradley_terry(pairs["differences"][:0], l2=l2).any()


@laws
@given(pair_sets(), penalties)
def test_a_stronger_pull_ends_nearer_to_zero(pairs, l2):
    near, far = fit_bradley_terry(**pairs, l2=10 * l2), fit_bradley_terry(**pairs, l2=l2)
    assert near.norm() <= far.norm() + 1e-6


@laws
@given(pair_sets(), penalties)
def test_nothing_is_left_where_the_offset_says_what_the_labels_say(pairs, l2):
    offset = torch.linspace(-2, 2, len(pairs["label"]), dtype=torch.float64)
    explained = {**pairs, "label": offset.sigmoid()}
    close(
        fit_bradley_terry(**explained, l2=l2, offset=offset),
        torch.zeros(pairs["differences"].shape[1]).double(),
    )


@laws
@given(labelled(), penalties, st.sampled_from([0.0, 0.5, 1.0]))
def test_renaming_the_classes_permutes_the_answer(rows, l2, class_balance):
    features, labels, classes = rows
    weights, biases = fit_softmax(features, labels, num_classes=classes, l2=l2, class_balance=class_balance)
    renamed = fit_softmax(
        features, classes - 1 - labels, num_classes=classes, l2=l2, class_balance=class_balance
    )
    close(renamed[0].flip(0), weights)
    close(renamed[1].flip(0), biases)


@laws
@given(labelled(), penalties, st.integers(2, 4))
def test_copies_of_one_class_change_nothing_when_classes_are_balanced(rows, l2, copies):
    features, labels, classes = rows
    counts = torch.where(labels == labels[0], copies, 1)
    plain = fit_softmax(features, labels, num_classes=classes, l2=l2)
    repeated = fit_softmax(
        features.repeat_interleave(counts, 0),
        labels.repeat_interleave(counts),
        num_classes=classes,
        l2=l2,
    )
    close(repeated[0], plain[0])
    close(repeated[1], plain[1])


@laws
@given(labelled(), penalties)
def test_weights_of_all_classes_sum_to_zero(rows, l2):
    """What all classes share does not help to tell them apart, so the penalty removes it."""
    features, labels, classes = rows
    weights, biases = fit_softmax(features, labels, num_classes=classes, l2=l2)
    close(weights.sum(dim=0), torch.zeros(features.shape[1], dtype=torch.float64))
    close(biases.sum(), torch.zeros((), dtype=torch.float64))
