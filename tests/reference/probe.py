"""Slow twin of prefmoe.nn.probe: gradient descent with hand-written gradients, plain floats."""

import math

from reference.routing import softmax


def descend(gradient, start, *, step):
    """Follow a gradient until it is below 1e-10 everywhere."""
    solution = list(start)
    for _ in range(100_000):
        slopes = gradient(solution)
        if max(map(abs, slopes)) < 1e-10:
            return solution
        solution = [x - step * slope for x, slope in zip(solution, slopes, strict=True)]
    raise AssertionError("gradient descent did not arrive")


def fit_bradley_terry(differences, *, l2, weight=None, label=None, offset=None):
    weight = weight or [1.0] * len(differences)
    label = label or [1.0] * len(differences)
    offset = offset or [0.0] * len(differences)
    largest = max(sum(x * x for x in row) for row in differences)

    def gradient(solution):
        slopes = [l2 * w for w in solution]
        for row, given, share, q in zip(differences, offset, weight, label, strict=True):
            margin = given + sum(w * x for w, x in zip(solution, row, strict=True))
            error = share / sum(weight) * (1 / (1 + math.exp(-margin)) - q)
            slopes = [slope + error * x for slope, x in zip(slopes, row, strict=True)]
        return slopes

    return descend(gradient, [0.0] * len(differences[0]), step=1 / (largest / 4 + l2))


def fit_softmax(features, labels, *, num_classes, l2, label_smoothing, class_balance, has_bias=True):
    """Rows of the answer are [weights of a class, then its bias]."""
    inputs = [[*row, float(has_bias)] for row in features]
    width = len(inputs[0])
    share = [1 / labels.count(label) ** class_balance for label in labels]
    largest = max(sum(x * x for x in row) for row in inputs)

    def gradient(flat):
        slopes = [l2 * value for value in flat]
        for row, label, weight in zip(inputs, labels, share, strict=True):
            logits = [sum(flat[c * width + i] * x for i, x in enumerate(row)) for c in range(num_classes)]
            for c, prob in enumerate(softmax(logits)):
                target = label_smoothing / num_classes + (1 - label_smoothing) * (c == label)
                for i, x in enumerate(row):
                    slopes[c * width + i] += weight / sum(share) * (prob - target) * x
        return slopes

    flat = descend(gradient, [0.0] * (num_classes * width), step=1 / (largest / 2 + l2))
    return [flat[c * width : (c + 1) * width] for c in range(num_classes)]
