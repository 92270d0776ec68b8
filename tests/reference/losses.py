"""Slow twin of prefmoe.nn.losses: plain floats, written from the formulas."""

import math


def pair_loss(chosen, rejected, target_margin=0.0):
    """-log(sigmoid(r_c - r_r - m)); Ouyang et al. 2022, Eq. 1; Touvron et al. 2023, Eq. 2."""
    return math.log(1 + math.exp(-(chosen - rejected - target_margin)))


def bradley_terry_loss(chosen, rejected, *, target_margin=None, weight=None, label=None):
    """Weighted mean over the pairs of the expected pair loss under the label."""
    num_pairs = len(chosen)
    target_margin = target_margin or [0.0] * num_pairs
    weight = weight or [1.0] * num_pairs
    label = label or [1.0] * num_pairs
    total = 0.0
    for c, r, m, w, q in zip(chosen, rejected, target_margin, weight, label, strict=True):
        total += w * (q * pair_loss(c, r, m) + (1 - q) * pair_loss(r, c, m))
    return total / sum(weight) if sum(weight) > 0 else 0.0
