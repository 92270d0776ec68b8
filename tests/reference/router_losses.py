"""Slow twin of prefmoe.nn.router_losses: sums over texts and tokens, one at a time.

Texts are lists of tokens without padding: a token that does not count is not there. A text's preference is a list
of shares, or None.
"""

import math

from reference.token_routing import group_shares, members, softmax


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def soft_target(preference, smoothing):
    """q: eps / (G - 1) on the other groups, 1 - eps on the own; mixtures of preferences mix their q."""
    others = len(preference) - 1
    return [
        sum(
            share * ((1 - smoothing) if own == group else smoothing / others)
            for own, share in enumerate(preference)
        )
        for group in range(len(preference))
    ]


def group_soft(texts, preferences, sizes, *, smoothing, temperature=1.0):
    """Mean over tokens of sum_g q_g log(q_g / c_g)."""
    losses = []
    for tokens, preference in zip(texts, preferences, strict=True):
        for logits in tokens if preference else []:
            shares = group_shares(logits, sizes, temperature=temperature)
            target = soft_target(preference, smoothing)
            losses.append(sum(q * math.log(q / c) for q, c in zip(target, shares, strict=True) if q > 0))
    return mean(losses)


def group_hinge(texts, preferences, sizes, *, threshold):
    """Mean over tokens of max(0, tau - c_k)^2, by the shares of the preference."""
    losses = []
    for tokens, preference in zip(texts, preferences, strict=True):
        for logits in tokens if preference else []:
            shares = group_shares(logits, sizes)
            losses.append(
                sum(p * max(0.0, threshold - c) ** 2 for p, c in zip(preference, shares, strict=True))
            )
    return mean(losses)


def localized_balance(texts, preferences, sizes, *, delta):
    """var(Z) / mean(Z)^2 (n - 1 in the variance), Z = mean weight of an expert in a text * (1 - or + delta)."""
    scaled = []
    for tokens, preference in zip(texts, preferences, strict=True):
        if not preference or not tokens:
            continue
        for group, experts in enumerate(members(sizes)):
            importance = preference[group] * (1 - delta) + (1 - preference[group]) * (1 + delta)
            scaled += [importance * mean(softmax(logits)[expert] for logits in tokens) for expert in experts]
    if len(scaled) < 2:
        return 0.0
    middle = mean(scaled)
    return sum((z - middle) ** 2 for z in scaled) / (len(scaled) - 1) / middle**2


def within_group(texts, sizes, *, temperature=1.0):
    """Mean over groups of the squared coefficient of variation of its experts' mean shares of it."""
    tokens = [logits for text in texts for logits in text]
    if not tokens:
        return 0.0
    variations = []
    for experts in members(sizes):
        shares = [softmax([logits[i] / temperature for i in experts]) for logits in tokens]
        means = [mean(share[place] for share in shares) for place in range(len(experts))]
        middle = mean(means)
        variations.append(mean((m - middle) ** 2 for m in means) / middle**2)
    return mean(variations)


def switch_balance(texts, sizes, *, top_k):
    """N * sum_i f_i P_i, the empty expert left out."""
    tokens = [softmax(logits[: sum(sizes)]) for text in texts for logits in text]
    chosen = [sorted(range(sum(sizes)), key=lambda i: -weights[i])[:top_k] for weights in tokens]
    total = 0.0
    for expert in range(sum(sizes)):
        load = mean((expert in choice) / top_k for choice in chosen)
        total += load * mean(weights[expert] for weights in tokens)
    return sum(sizes) * total


def empty_mass(texts, *, target):
    """(mean weight of the empty expert - target)^2."""
    masses = [softmax(logits)[-1] for text in texts for logits in text]
    return (mean(masses) - target) ** 2 if masses else 0.0


def entropy(weights):
    return -sum(w * math.log(w) for w in weights if w > 0)
