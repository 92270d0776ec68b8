"""Router arithmetic is float32 whatever comes in, its gradients are right, and no float32 copy is kept."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prefmoe.nn import RecurrentRouter, TokenRouter
from prefmoe.nn.token_routing import float32_linear


def with_gradients(function, x, weight, upstream):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(x, weight)
    (out * upstream).sum().backward()
    return out.detach(), x.grad, weight.grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_linear_is_the_float32_computation_also_under_autocast(dtype, autocast):
    x, weight, upstream = torch.randn(2, 5, 6).to(dtype), torch.randn(3, 6), torch.randn(2, 5, 3)
    expected = with_gradients(lambda x, weight: F.linear(x.float(), weight), x, weight, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = with_gradients(float32_linear, x, weight, upstream)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
    assert got[0].dtype == got[2].dtype == torch.float32


def test_float32_linear_of_a_bfloat16_weight_gives_a_float32_result_and_a_bfloat16_gradient():
    x, weight, upstream = torch.randn(4, 6).bfloat16(), torch.randn(3, 6).bfloat16(), torch.randn(4, 3)
    out, _, grad = with_gradients(float32_linear, x, weight, upstream)
    assert (out.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(out, x.float() @ weight.float().T)


def test_float32_linear_passes_gradcheck():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(float32_linear, (x, weight))


def test_float32_linear_of_one_token_without_further_dimensions():
    x, weight, upstream = torch.randn(4), torch.randn(3, 4), torch.randn(3)
    expected = with_gradients(F.linear, x, weight, upstream)
    for ours, theirs in zip(with_gradients(float32_linear, x, weight, upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_float32_linear_keeps_the_activation_as_it_came():
    x = torch.randn(64, 8).bfloat16().requires_grad_()
    weight = torch.randn(3, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        float32_linear(x, weight)
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [
        (torch.bfloat16, (64, 8)),
        (torch.float32, (3, 8)),
    ]


@pytest.mark.parametrize("asked", ["x", "weight"])
def test_float32_linear_with_only_one_gradient_asked(asked):
    x, weight = (
        torch.randn(4, 6, requires_grad=asked == "x"),
        torch.randn(3, 6, requires_grad=asked == "weight"),
    )
    float32_linear(x, weight).sum().backward()
    assert (x.grad is not None, weight.grad is not None) == (asked == "x", asked == "weight")


@pytest.mark.parametrize("autocast", [False, True])
def test_routers_are_float32_under_bfloat16_and_autocast(autocast):
    x = torch.randn(2, 5, 6).bfloat16()
    cell = nn.GRUCell(4, 4, bias=False)
    linear, recurrent = TokenRouter(6, num_choices=3), RecurrentRouter(6, num_choices=3, size=4)
    exact, exact_state = copy.deepcopy(recurrent).double()(x.double(), None, copy.deepcopy(cell).double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = linear(x)
        recurrent_logits, state = recurrent(x, None, cell)
    assert logits.dtype == recurrent_logits.dtype == state.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ linear.weight.T)
    torch.testing.assert_close(recurrent_logits, exact.float())
    torch.testing.assert_close(state, exact_state.float())


def test_the_recurrent_router_passes_gradcheck():
    cell = nn.GRUCell(3, 3, bias=False).double()
    router = RecurrentRouter(4, num_choices=2, size=3).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    below = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, below, *_):
        return router(x, below, cell)

    assert torch.autograd.gradcheck(run, (x, below, *router.parameters(), *cell.parameters()))


def test_a_router_starts_normal_with_standard_deviation_two_hundredths():
    weights = TokenRouter(4000, num_choices=5).weight
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(weights.mean().item()) < 0.001
