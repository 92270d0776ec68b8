"""Slow twin of prefmoe.nn.token_routing: one token, one number at a time (SPECS 1.4 and 3.3)."""

import math

from reference.lora_bank import matrix_vector


def softmax(values):
    highest = max(values)
    powers = [math.exp(value - highest) for value in values]
    return [power / sum(powers) for power in powers]


def members(sizes):
    """Numbers of the experts of every group."""
    starts = [sum(sizes[:group]) for group in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def route_token(logits, sizes, *, has_empty, temperature=1.0, top_k=None, log_factors=None):
    """Softmax of z / T + log f; what the experts that are not chosen had goes to the empty one, or is dropped.

    Ties go to whoever they go to: give logits without ties if `top_k` matters.
    """
    factors = log_factors or [0.0] * len(logits)
    weights = softmax([z / temperature + f for z, f in zip(logits, factors, strict=True)])
    num_experts = sum(sizes)
    if top_k is None:
        return weights
    likeliest = sorted(range(num_experts), key=lambda i: weights[i], reverse=True)[:top_k]
    chosen = [weights[i] if i in likeliest else 0.0 for i in range(num_experts)]
    return [*chosen, 1 - sum(chosen)] if has_empty else chosen


def group_shares(logits, sizes, *, temperature=1.0):
    """Weight of every group over that of all experts; the empty expert is none."""
    weights = softmax([z / temperature for z in logits[: sum(sizes)]])
    return [sum(weights[i] for i in group) for group in members(sizes)]


def gru(x, below, weight_ih, weight_hh):
    """h' = (1 - z) n + z h with s = sig(W_s x + U_s h), z = sig(W_z x + U_z h), n = tanh(W_n x + s * (U_n h))."""
    size = len(below)
    from_x, from_h = matrix_vector(weight_ih, x), matrix_vector(weight_hh, below)
    above = []
    for i in range(size):
        s = 1 / (1 + math.exp(-(from_x[i] + from_h[i])))
        z = 1 / (1 + math.exp(-(from_x[size + i] + from_h[size + i])))
        n = math.tanh(from_x[2 * size + i] + s * from_h[2 * size + i])
        above.append((1 - z) * n + z * below[i])
    return above


def recurrent_layer(x, below, projection, weight, weight_ih, weight_hh):
    """Logits and state of one token in one layer: x' = P x, h = GRU(x', h below), z = W h."""
    state = gru(matrix_vector(projection, x), below, weight_ih, weight_hh)
    return matrix_vector(weight, state), state
