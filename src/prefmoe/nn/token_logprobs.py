"""Log-probabilities of given tokens under a language model's head, without keeping its logits."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """What a head says about given next tokens."""

    logprobs: Float[Tensor, " tokens"]  # nats; the only one with a gradient
    entropy: Float[Tensor, " tokens"]  # of the next token's distribution, nats
    mean_logits: Float[Tensor, " tokens"]
    is_top1: Bool[Tensor, " tokens"]  # whether the token is the most likely one


def token_logprobs(
    states: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    max_logits: int = 2**22,
) -> TokenLogprobs:
    r"""$\log p(t \mid h) = w_t h - \log\sum_v e^{w_v h}$ for every state h and its token t.

    Args:
        states: Last states of the model, after its last norm.
        weight: The head's, frozen: it gets no gradient.
        targets: The token that follows each state.
        max_logits: How many logits there may be at once; 2**22 take 16 MiB, and as much again for their shares.

    Returns:
        Log-probabilities with their gradient to `states`, and statistics without; float32.

    Numerics:
        Logits are products in the dtype of `states`, but for the given tokens', which like all else are float32: the
        rounding of those would add up over a text, that of the others averages out. The gradient,
        $g\,(w_t - \sum_v p_v w_v)$, is computed on the way forward, so logits are neither kept nor computed twice; the
        probabilities less 1 at t are rounded to the dtype of `states` before that product, which is rounded once.

    Source:
        Gradient on the way forward: Hsu et al. 2024 (Liger), arXiv:2410.10989, section 3.2, there of the loss.
        Slow form: tests/reference/token_logprobs.py.
    """
    chunks = [
        _Chunk.apply(chunk, weight, target)  # type: ignore[no-untyped-call]
        for chunk, target in _few_at_a_time(states, targets, max_logits // len(weight))
    ]
    return TokenLogprobs(*(torch.cat(values) for values in zip(*chunks, strict=True)))


@torch.no_grad()
def scored_logprobs(
    states: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    max_logits: int = 2**22,
) -> Float[Tensor, " tokens"]:
    """The log-probabilities of `token_logprobs` alone, without gradient; arguments, numerics and slow form are its."""
    chunks = []
    for chunk, target in _few_at_a_time(states, targets, max_logits // len(weight)):
        logits = _logits(chunk, weight, target)
        chunks.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1))
    return torch.cat(chunks)


def _logits(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(tokens, vocabulary) float32."""
    logits = (states @ weight.T).float()
    if torch.finfo(states.dtype).bits < 32:
        exact = torch.linalg.vecdot(states.float(), weight[targets].float())
        logits.scatter_(1, targets[:, None], exact[:, None])
    return logits


def _few_at_a_time(states: Tensor, targets: Tensor, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    number = max(1, number)
    return zip(torch.split(states, number), torch.split(targets, number), strict=True)


class _Chunk(torch.autograd.Function):
    """So few tokens that all their logits may be there at once."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> TokenLogprobs:
        logits = _logits(states, weight, targets)
        mean, is_top1 = logits.mean(dim=1), logits.argmax(dim=1) == targets
        places = targets[:, None]
        every = logits.sub_(logits.logsumexp(dim=1, keepdim=True))
        logprobs = every.gather(1, places)[:, 0]
        shares = every.exp()
        entropy = -torch.linalg.vecdot(shares, every)
        ctx.mark_non_differentiable(entropy, mean, is_top1)
        if ctx.needs_input_grad[0]:
            shares.scatter_add_(1, places, shares.new_full(places.shape, -1.0))
            ctx.save_for_backward(shares.neg_().to(states.dtype) @ weight)
        return TokenLogprobs(logprobs, entropy, mean, is_top1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None
