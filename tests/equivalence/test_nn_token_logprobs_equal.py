"""Log-probabilities of tokens without kept logits: the values and gradients of the plain formula."""

import pytest
import torch
from torch.nn import functional as F

from prefmoe.nn import scored_logprobs, token_logprobs
from reference import token_logprobs as slow


def made_up(num_tokens=7, vocabulary=11, hidden=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_tokens, hidden, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=dtype)
    return states, weight, torch.randint(0, vocabulary, (num_tokens,), generator=generator)


@pytest.mark.parametrize("max_logits", [1, 25, 2**22])
def test_it_equals_the_slow_form_however_it_is_cut(max_logits):
    states, weight, targets = made_up()
    found = token_logprobs(states.requires_grad_(), weight, targets, max_logits=max_logits)
    expected = slow.token_logprobs(states.tolist(), weight.tolist(), targets.tolist())
    for values, wanted in zip(found[:3], list(zip(*expected, strict=True))[:3], strict=True):
        torch.testing.assert_close(
            values.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-5
        )
    assert found.is_top1.tolist() == [row[3] for row in expected]
    scales = torch.arange(1.0, 8.0)
    (found.logprobs * scales).sum().backward()
    wanted = [
        [scale * value for value in slow.gradient(state, weight.tolist(), target)]
        for scale, state, target in zip(scales.tolist(), states.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(states.grad, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_logits", [1, 25, 2**22])
def test_scored_alone_they_are_the_same(max_logits):
    states, weight, targets = made_up()
    found = scored_logprobs(states.requires_grad_(), weight, targets, max_logits=max_logits)
    expected = [row[0] for row in slow.token_logprobs(states.tolist(), weight.tolist(), targets.tolist())]
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    assert not found.requires_grad
    assert scored_logprobs(states[:0], weight, targets[:0]).shape == (0,)


def test_bfloat16_gradients_are_no_further_off_than_those_of_kept_logits():
    states, weight, targets = made_up(40, 400, 64, dtype=torch.float32)
    states[:20] += (
        0.2 * weight[targets[:20]]
    )  # tokens that the head is sure of, whose gradients nearly cancel
    gradients = {}
    for name, dtype in (("exact", torch.float64), ("plain", torch.bfloat16), ("ours", torch.bfloat16)):
        leaf = states.bfloat16().to(dtype).requires_grad_()
        head = weight.bfloat16().to(dtype)
        if name == "ours":
            logprobs = token_logprobs(leaf, head, targets).logprobs
        else:
            logits = (leaf @ head.T).to(torch.promote_types(dtype, torch.float32))
            logprobs = -F.cross_entropy(logits, targets, reduction="none")
        logprobs.sum().backward()
        gradients[name] = leaf.grad.double()
    error = {name: (gradients[name] - gradients["exact"]).norm() for name in ("plain", "ours")}
    assert 0 < error["ours"] <= 1.1 * error["plain"]


@pytest.mark.parametrize("of_states", [scored_logprobs, lambda *given: token_logprobs(*given).logprobs])
def test_bfloat16_logits_of_the_tokens_are_not_rounded(of_states):
    states, weight, targets = made_up(200, 400, 64)
    states, weight = states.bfloat16(), (0.2 * weight).bfloat16()
    exact = (states.double() @ weight.double().T).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    rounded = (states @ weight.T).float().log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    errors = [(found - exact).abs().mean() for found in (of_states(states, weight, targets), rounded)]
    assert errors[0] < 0.6 * errors[1]


def test_without_gradients_and_without_tokens_there_is_nothing_to_keep():
    states, weight, targets = made_up()
    assert not token_logprobs(states, weight, targets).logprobs.requires_grad
    empty = token_logprobs(states[:0].requires_grad_(), weight, targets[:0])
    assert empty.logprobs.shape == (0,)
    empty.logprobs.sum().backward()
