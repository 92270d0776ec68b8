"""Slow twin of prefmoe.nn.token_logprobs: plain floats, one token at a time."""

import math


def token_logprobs(states, weight, targets):
    """For each state: log-probability of its token, entropy, mean logit, whether the token is the first maximum."""
    rows = []
    for state, target in zip(states, targets, strict=True):
        logits = [sum(w * h for w, h in zip(row, state, strict=True)) for row in weight]
        total = math.log(sum(math.exp(logit) for logit in logits))
        every = [logit - total for logit in logits]
        entropy = -sum(math.exp(one) * one for one in every)
        rows.append((every[target], entropy, sum(logits) / len(logits), logits.index(max(logits)) == target))
    return rows


def gradient(state, weight, target):
    """Of one log-probability to its state: the token's row of the head less the expected row."""
    exponents = [math.exp(sum(w * h for w, h in zip(row, state, strict=True))) for row in weight]
    shares = [value / sum(exponents) for value in exponents]
    return [
        weight[target][i] - sum(share * row[i] for share, row in zip(shares, weight, strict=True))
        for i in range(len(state))
    ]
