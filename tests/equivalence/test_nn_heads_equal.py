"""Gradients and precision of pooling, aggregators and ensembles; slow twins of the convex fits."""

import pytest
import torch

from prefmoe.nn import (
    TaskRouter,
    build_aggregator,
    fit_bradley_terry,
    fit_softmax,
    mean_reward,
    mean_tokens,
    pack_left,
    uncertainty_weighted,
    worst_case,
)
from reference import probe as slow

KINDS = ["task_head", "linear_scores", "linear_states", "mlp"]


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    "pool",
    [
        lambda states: pack_left(states, torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]))[0],
        lambda states: mean_tokens(states, torch.tensor([1, 4]), torch.tensor([3, 4])),
    ],
    ids=["pack_left", "mean_tokens"],
)
def test_pooling_passes_gradcheck(pool):
    assert torch.autograd.gradcheck(pool, random(2, 4, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_aggregators_pass_gradcheck(kind):
    torch.manual_seed(0)
    aggregator = build_aggregator(kind, num_experts=2, hidden=3).double()
    for parameter in aggregator.parameters():
        torch.nn.init.normal_(parameter)

    def rewards(states, scores, *_):
        return aggregator(states, scores)

    inputs = (random(2, 2, 3), random(2, 2, seed=1), *aggregator.parameters())
    assert torch.autograd.gradcheck(rewards, inputs)


@pytest.mark.parametrize("ensemble", [mean_reward, worst_case, uncertainty_weighted])
def test_ensembles_pass_gradcheck(ensemble):
    assert torch.autograd.gradcheck(ensemble, random(3, 4))


def test_the_router_passes_gradcheck():
    router = TaskRouter(num_tasks=3, hidden=4).double()
    inputs = (random(2, 4), router.weight, router.bias)
    assert torch.autograd.gradcheck(lambda features, *_: router(features), inputs)


def test_bfloat16_states_are_averaged_in_float32():
    """256 tokens of 1.0 and one of 2.0: bfloat16 would stop counting at 256."""
    states = torch.ones(1, 257, 1, dtype=torch.bfloat16)
    states[0, 0] = 2.0
    pooled = mean_tokens(states, torch.tensor([0]), torch.tensor([257]))
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(258 / 257)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_experts_are_aggregated_in_float32(kind):
    torch.manual_seed(0)
    aggregator = build_aggregator(kind, num_experts=2, hidden=8)
    states, scores = torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 2).bfloat16()
    rewards = aggregator(states, scores)
    assert rewards.dtype == torch.float32
    assert torch.equal(rewards, aggregator(states.float(), scores.float()))


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "weights, labels and offset"])
def test_fit_bradley_terry_equals_gradient_descent(extras):
    differences = random(6, 2).detach()
    options = {}
    if extras:
        options = {"weight": torch.rand(6).double(), "label": torch.rand(6).double()}
        options["offset"] = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
    expected = slow.fit_bradley_terry(
        differences.tolist(), l2=0.2, **{name: value.tolist() for name, value in options.items()}
    )
    fitted = fit_bradley_terry(differences, l2=0.2, **options)
    torch.testing.assert_close(fitted.tolist(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("class_balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_fit_softmax_equals_gradient_descent(class_balance, label_smoothing, has_bias):
    features, labels = random(6, 2).detach(), [0, 0, 0, 1, 0, 2]
    options = {
        "num_classes": 4,  # class 3 has no row
        "l2": 0.3,
        "label_smoothing": label_smoothing,
        "class_balance": class_balance,
        "has_bias": has_bias,
    }
    expected = torch.tensor(slow.fit_softmax(features.tolist(), labels, **options), dtype=torch.float64)
    weights, biases = fit_softmax(features, torch.tensor(labels), **options)
    torch.testing.assert_close(weights, expected[:, :2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(biases, expected[:, 2], rtol=1e-6, atol=1e-7)
