"""Best-of-n of one prompt, by trying every subset and by drawing subsets; no formula."""

import itertools
import random


def chosen_target(proxy, target, drawn):
    """Target of the drawn completion with the highest proxy; mean over those that share it."""
    top = max(proxy[i] for i in drawn)
    winners = [target[i] for i in drawn if proxy[i] == top]
    return sum(winners) / len(winners)


def by_every_subset(proxy, target, n):
    subsets = list(itertools.combinations(range(len(proxy)), n))
    return sum(chosen_target(proxy, target, drawn) for drawn in subsets) / len(subsets)


def by_monte_carlo(proxy, target, n, *, num_draws, seed):
    rng = random.Random(seed)
    results = [chosen_target(proxy, target, rng.sample(range(len(proxy)), n)) for _ in range(num_draws)]
    mean = sum(results) / num_draws
    variance = sum((result - mean) ** 2 for result in results) / (num_draws - 1)
    return mean, (variance / num_draws) ** 0.5
